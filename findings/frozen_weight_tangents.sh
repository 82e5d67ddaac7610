#!/usr/bin/env bash
# A forward derivative multiplies with the tangents of weights that have none.
#
# Guess: where only the input has a tangent, x W^T has the tangent dx W^T: two products in all, the answer and its tangent.
# Seen: three, in every spelling, and of a convolution too: torch makes a tangent of zeros for the weight and multiplies the input with
# it. A network's derivative costs half as much again as it has to.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" numpy
cat > "$place/products.py" <<'PYTHON'
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)
x, change, weight, bias = torch.randn(64, 32), torch.randn(64, 32), torch.randn(16, 32), torch.randn(16)
maps, maps_change, kernel = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3)
seen = {}
for name, layer, at, along in (
    ("F.linear with a bias", lambda x: F.linear(x, weight, bias), x, change),
    ("x @ weight.T", lambda x: x @ weight.T, x, change),
    ("F.conv2d", lambda x: F.conv2d(x, kernel), maps, maps_change),
):
    with FlopCounterMode(display=False) as plain:
        layer(at)
    with FlopCounterMode(display=False) as counter, forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(at, along)))
    expected = layer(along) - (bias if "bias" in name else 0)
    assert torch.allclose(tangent, expected, atol=1e-4), "another tangent than that of a fixed weight"
    seen[name] = counter.get_total_flops() / plain.get_total_flops()
    print("torch", torch.__version__, "-", name + ":", seen[name], "products")
assert set(seen.values()) == {3.0}, seen
PYTHON
"$place/env/bin/python" -W ignore "$place/products.py"
