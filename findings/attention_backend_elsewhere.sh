#!/usr/bin/env bash
# model.set_attention_backend does nothing on a UNet, and changes what another model, that was never asked, computes with.
#
# Guess: it sets the backend of that model's attention layers; a model that cannot take it refuses; others are not touched.
# Seen: a UNet's processors know no backend, and torch's own attention runs as before, without a word. But the call also sets
# the process's default, which every model takes whose processors were not told: a Wan transformer beside it now runs it.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1"
"$place/env/bin/python" -W ignore - <<'PYTHON'
import diffusers
import torch
from diffusers import UNet2DModel, WanTransformer3DModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)
diffusers.logging.set_verbosity_error()
torch.manual_seed(0)
blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",), "norm_num_groups": 4}
unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, attention_head_dim=4, **blocks)
sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
wan = WanTransformer3DModel(patch_size=(1, 2, 2), freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=32, **sizes)


def kernels(model, *given, **named):
    """The attention that its backward pass will walk."""
    found, seen, left = set(), set(), [model(*given, **named, return_dict=False)[0].grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            if "Attention" in node.name() or "Softmax" in node.name():
                found.add(node.name().removesuffix("Backward0"))
    return found


def both():
    video = torch.randn(1, 4, 1, 8, 8), torch.tensor([500]), torch.randn(1, 5, 8)
    return {"unet": kernels(unet, torch.randn(1, 3, 8, 8), 500), "wan": kernels(wan, *video)}


before = both()
unet.set_attention_backend("_native_math")
after = both()
print("before:", before)
print("after unet.set_attention_backend('_native_math'):", after)
fused = {"ScaledDotProductFlashAttentionForCpu"}
assert before == {"unet": fused, "wan": fused}, "another kernel runs by default"
assert after["unet"] == fused, "the UNet heeds its backend"
assert after["wan"] == {"SafeSoftmax"}, "the other model stays as it was"
PYTHON
