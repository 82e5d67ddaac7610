#!/usr/bin/env bash
# A component that is set to None and put back is no longer saved with its pipeline.
#
# Guess: pipe.safety_checker = None for one call, then pipe.safety_checker = checker again, leaves the pipeline as it was.
# Seen: the attribute and pipe.components are as before, and save_pretrained writes a pipeline without the checker: no folder,
# and null in model_index.json, without a word. What is saved follows pipe.config, which was changed by the None and is not
# changed back. register_modules(safety_checker=checker) puts it back for good.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1" "transformers==5.24.0"
"$place/env/bin/python" -W ignore - "$place" <<'PYTHON'
import json
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

print("diffusers", diffusers.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
checker = StableDiffusionSafetyChecker(
    CLIPConfig(vision_config={**small, "image_size": 32, "patch_size": 16}, text_config={**small, "vocab_size": 16}, projection_dim=8)
)
blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "norm_num_groups": 4}
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, **blocks
)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
pipe = StableDiffusionPipeline(vae, None, None, unet, DDIMScheduler(), checker, CLIPImageProcessor())


def saved(name):
    folder = Path(sys.argv[1], name)
    pipe.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())["safety_checker"], (folder / "safety_checker").is_dir()


seen = {"as made": saved("made")}
pipe.safety_checker = None
pipe.safety_checker = checker
assert pipe.components["safety_checker"] is checker
seen["put back"] = saved("put_back")
pipe.register_modules(safety_checker=checker)
seen["registered"] = saved("registered")
for name, (index, folder) in seen.items():
    print(f"{name}: model_index.json says {index}, {'a' if folder else 'no'} folder")
there = (["stable_diffusion", "StableDiffusionSafetyChecker"], True)
assert seen == {"as made": there, "put back": ([None, None], False), "registered": there}, "it is saved otherwise than was seen"
PYTHON
