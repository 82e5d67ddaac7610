#!/usr/bin/env bash
# What a second derivative through once_differentiable is depends on who asks: torch.autograd or torch.func.
#
# Guess: a Function whose backward is once_differentiable cannot be differentiated twice, and whoever tries gets an error.
# Seen: torch.autograd.grad raises. torch.func.grad of torch.func.grad raises nothing: the second derivative of x^3 at 2, which is
# 12, comes out as 0.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" numpy
cat > "$place/twice.py" <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


x, seen = torch.tensor(2.0), {}
seen["torch.func.grad of torch.func.grad"] = torch.func.grad(torch.func.grad(Cube.apply))(x).item()
leaf = x.clone().requires_grad_()
(once,) = torch.autograd.grad(Cube.apply(leaf), leaf, create_graph=True)
try:
    seen["torch.autograd.grad twice"] = torch.autograd.grad(once, leaf)[0].item()
except RuntimeError:
    seen["torch.autograd.grad twice"] = "raised"
for name, value in seen.items():
    print("torch", torch.__version__, "-", name + ":", value)
assert list(seen.values()) == [0.0, "raised"], seen
PYTHON
"$place/env/bin/python" -W ignore "$place/twice.py"
