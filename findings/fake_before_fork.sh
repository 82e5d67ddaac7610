#!/usr/bin/env bash
# Whether a forked process can go backward depends on whether its parent used fake tensors before its first backward pass.
#
# Guess: FakeTensorMode computes shapes alone, so having used it changes nothing about later processes; and a parent that has
# gone backward on the CPU, with no GPU there, may be forked.
# Seen: the latter is so, in a process whose first backward pass came before its first FakeTensorMode. In the other order the
# child's backward pass raises "Unable to handle autograd's threading in combination with fork-based multiprocessing". On a
# machine without a GPU the mode puts a stand-in for the device guard of CUDA in its place, and autograd, which counts the
# devices once, at the first backward pass, starts a thread for that.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" numpy
cat > "$place/order.py" <<'PYTHON'
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def backward():
    torch.ones(3, requires_grad=True).square().sum().backward()


if sys.argv[1] == "backward first":
    backward()
with FakeTensorMode():
    backward()
process = os.fork()
if process == 0:
    try:
        backward()
    except RuntimeError as error:
        os._exit(2 if "fork-based multiprocessing" in str(error) else 3)
    os._exit(0)
seen = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print("torch", torch.__version__, "-", sys.argv[1] + ":", "the child goes backward" if seen == 0 else "the child cannot")
assert seen == (0 if sys.argv[1] == "backward first" else 2), f"exit code {seen} is another one than was seen"
PYTHON
for order in "backward first" "fake tensors first"; do
    CUDA_VISIBLE_DEVICES="" "$place/env/bin/python" -W ignore "$place/order.py" "$order"
done
