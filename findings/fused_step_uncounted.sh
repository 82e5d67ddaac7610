#!/usr/bin/env bash
# Whether autograd notices that an optimizer changed a weight that a graph still needs depends on the optimizer's implementation.
#
# Guess: every optimizer step changes the weights in place, in place changes count a tensor's version up, and a backward pass
# through a graph of before the step raises "modified by an inplace operation", whichever implementation took the step.
# Seen: so it is with foreach=True and with foreach=False. The step of fused=True leaves the version as it was; a backward pass
# through the older graph raises nothing, and computes with the new weights: d(w x)/dx is the w of after the step. Whatever
# else watches versions (a cache of something made of the weights) does not notice either. torch.autograd.graph.increment_version
# tells them.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" numpy
cat > "$place/step.py" <<'PYTHON'
import torch

seen = {}
for name, how in {"foreach": {"foreach": True}, "loop": {"foreach": False}, "fused": {"fused": True}}.items():
    weight, x = torch.nn.Parameter(torch.ones(3)), torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1.0, **how)
    graph = (weight * x).sum()
    weight.grad = torch.ones(3)
    before = weight._version
    optimizer.step()
    try:
        graph.backward()
        backward = "gave the new weight" if torch.equal(x.grad, weight.data) else "gave the old weight"
    except RuntimeError as error:
        backward = "raised" if "modified by an inplace operation" in str(error) else str(error)
    seen[name] = (weight._version > before, backward)
    print("torch", torch.__version__, "-", name + ":", "version counted up:", seen[name][0], "- backward through the older graph", backward)
assert seen == {"foreach": (True, "raised"), "loop": (True, "raised"), "fused": (False, "gave the new weight")}, seen
PYTHON
CUDA_VISIBLE_DEVICES="" "$place/env/bin/python" -W ignore "$place/step.py"
