#!/usr/bin/env bash
# DDIMScheduler.from_config(other.config) gives two different schedulers from two equal configurations.
#
# Guess: a scheduler that is saved and loaded again has the same configuration, so a sampler made of it by from_config is the
# same one before and after.
# Seen: the configurations are equal, value by value, and the samplers differ in their noise table (linear against
# scaled_linear) and in clip_sample. A scheduler that was made in Python remembers which values were its class's defaults, and
# from_config takes the other class's defaults for those; in the file they are ordinary values.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "diffusers==0.42.1"
"$place/env/bin/python" -W ignore - "$place/scheduler" <<'PYTHON'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler, LCMScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)
made = LCMScheduler(original_inference_steps=4)
made.save_pretrained(sys.argv[1])
loaded = LCMScheduler.from_pretrained(sys.argv[1])


def public(scheduler):
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


assert public(made) == public(loaded), "the configurations differ"
swapped = {name: DDIMScheduler.from_config(one.config) for name, one in {"made": made, "loaded": loaded}.items()}
seen = {name: (ddim.config.beta_schedule, ddim.config.clip_sample) for name, ddim in swapped.items()}
noise = {name: round(float(ddim.alphas_cumprod[499]), 4) for name, ddim in swapped.items()}
print("beta_schedule and clip_sample:", seen, "alphas_cumprod[499]:", noise)
assert seen == {"made": ("linear", True), "loaded": ("scaled_linear", False)}, "the samplers are others than were seen"
assert noise["made"] != noise["loaded"]
PYTHON
