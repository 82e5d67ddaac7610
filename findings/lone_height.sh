#!/usr/bin/env bash
# A height without a width is ignored by Stable Diffusion's pipeline, whatever it is.
#
# Guess: pipe(prompt, height=128) samples 128 pixels high and as wide as the model's default; a height that is no multiple of
# 8 is refused, as it is beside a width.
# Seen: where one of the two is missing, both become the default, before they are checked: no error, no warning, and a
# picture of the default size. StableDiffusionXLPipeline fills in each by itself.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1" "transformers==5.24.0"
"$place/env/bin/python" -W ignore - <<'PYTHON'
import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)
diffusers.logging.set_verbosity_error()
blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "norm_num_groups": 4}
sizes = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 4}
eight = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, **eight)  # 8 pixels to a latent
told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 8}
pipe = StableDiffusionPipeline(
    vae, None, None, UNet2DConditionModel(**sizes, **blocks), DDIMScheduler(), None, None, requires_safety_checker=False
)
larger = StableDiffusionXLPipeline(
    vae, None, None, None, None, UNet2DConditionModel(**sizes, **blocks, **told), DDIMScheduler(), add_watermarker=False
)
text = {"prompt_embeds": torch.randn(1, 4, 8), "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
pooled = {"pooled_prompt_embeds": torch.randn(1, 8)}


def shape(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    return tuple(pipeline(**text, **call).images.shape[2:])


seen = {
    "both": shape(pipe, height=128, width=64),
    "height=128": shape(pipe, height=128),
    "height=17": shape(pipe, height=17),
    "width=128": shape(pipe, width=128),
    "XL, height=128": shape(larger, height=128, **pooled),
}
print("latents, high and wide:", seen)
default = (8, 8)
assert seen == {
    "both": (16, 8),
    "height=128": default,
    "height=17": default,
    "width=128": default,
    "XL, height=128": (16, 8),
}, "sizes are filled in otherwise than was seen"
PYTHON
