#!/usr/bin/env bash
# Whether torch._foreach_add_(tensors, number) makes the host wait depends on whether alpha=1 is given, where the number is a tensor.
#
# Guess: a tensor of no axes that lies on the device is added there, as by _foreach_mul_, and alpha=1, the default, changes nothing.
# Seen: _foreach_add_(tensors, number) takes the number for a scalar, and the host reads it (aten::_local_scalar_dense; on a GPU, a
# wait for all that was begun). With alpha=1 the overload for tensors is taken and nothing is read; _foreach_mul_ reads nothing
# either. The results are equal.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" numpy
cat > "$place/reads.py" <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


number, seen = torch.tensor(2.0), {}
for name, change in {
    "add": lambda tensors: torch._foreach_add_(tensors, number),
    "add, alpha=1": lambda tensors: torch._foreach_add_(tensors, number, alpha=1),
    "mul": lambda tensors: torch._foreach_mul_(tensors, number),
}.items():
    tensors = [torch.full((3,), 2.0) for _ in range(4)]
    with Reads() as reads:
        change(tensors)
    assert all(torch.equal(tensor, torch.full((3,), 4.0)) for tensor in tensors)
    seen[name] = reads.count
    print("torch", torch.__version__, "-", name + ":", reads.count, "reads by the host")
assert seen == {"add": 1, "add, alpha=1": 0, "mul": 0}, seen
PYTHON
CUDA_VISIBLE_DEVICES="" "$place/env/bin/python" -W ignore "$place/reads.py"
