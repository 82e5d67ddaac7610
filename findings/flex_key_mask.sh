#!/usr/bin/env bash
# diffusers' flex backend reads a mask of keys as one of queries, and says nothing.
#
# Guess: dispatch_attention_fn(query, key, value, attn_mask=mask) with a mask (batch, keys), which says which keys are there, means
# the same in every backend; "native" and "xformers" expand it over heads and queries.
# Seen: "flex" takes the mask's entries for queries. Queries of masked places get zeros, all others attend to masked keys, too.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1"
"$place/env/bin/python" -W ignore - <<'PYTHON'
import diffusers
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.nn.functional import scaled_dot_product_attention

print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
query, key, value = (torch.randn(1, 4, 1, 8) for _ in range(3))  # (batch, length, heads, channels)
mask = torch.tensor([[True, True, False, False]])  # two keys, and two of padding
with torch.no_grad():
    seen = {name: dispatch_attention_fn(query, key, value, attn_mask=mask, backend=name) for name in ("native", "flex")}
formula = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask[:, None, None])
whole = dispatch_attention_fn(query, key, value)
for name, answer in seen.items():
    print(f"{name:>8}, first channel of four queries:", [round(x, 3) for x in answer[0, :, 0, 0].tolist()])
assert torch.allclose(seen["native"], formula.transpose(1, 2), atol=1e-5), "native no longer masks keys"
assert torch.allclose(seen["flex"][:, :2], whole[:, :2], atol=1e-5), "flex no longer attends to masked keys"
assert not seen["flex"][:, 2:].any(), "flex no longer gives zeros to masked queries"
PYTHON
