#!/usr/bin/env bash
# Lumina2's dynamic shift does not follow the resolution.
#
# Guess: with use_dynamic_shifting=True the pipeline passes a mu that grows with the number of image tokens, as Flux's does,
# from base_shift at 256 tokens to max_shift at 4096.
# Seen: mu is 0.4573 at 32, 128 and 256 pixels. The length of the sequence is read from the second axis of latents that are
# (batch, channels, height, width) here, so it is the number of channels (4), at every size.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1" "transformers==5.24.0"
"$place/env/bin/python" -W ignore - <<'PYTHON'
import functools

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)
heads = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 4, 8), "axes_lens": (64, 64, 64)}
transformer = Lumina2Transformer2DModel(
    sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, cap_feat_dim=16, **heads
)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
pipe = Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None)
pipe.set_progress_bar_config(disable=True)

passed = {}
set_timesteps = scheduler.set_timesteps


@functools.wraps(set_timesteps)
def noted(*args, **kwargs):
    passed[size] = round(kwargs["mu"], 4)
    return set_timesteps(*args, **kwargs)


scheduler.set_timesteps = noted
text = {"prompt_embeds": torch.randn(1, 6, 16), "prompt_attention_mask": torch.ones(1, 6, dtype=torch.bool)}
for size in (32, 128, 256):
    pipe(**text, height=size, width=size, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
print("mu by size in pixels:", passed)
by_channels = round(0.5 + (4 - 256) * (1.15 - 0.5) / (4096 - 256), 4)
assert passed == dict.fromkeys((32, 128, 256), by_channels), "the shift is another one than was seen"
PYTHON
