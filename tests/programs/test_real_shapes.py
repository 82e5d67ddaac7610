"""Real models from configuration files alone: docs/shapes has three that look at pictures, and no weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stock_process import PLAIN_TEXTS

from fewstep.programs.planning.drawn import answering
from fewstep.programs.planning.weightless import fake_tensors, weightless_teacher
from fewstep.recording.pipeline import modules_of

SHAPES = Path(__file__).resolve().parents[2] / "docs" / "shapes"
#: The parameters of the published weights.
PUBLISHED = {
    "sdxl-controlnet": {
        "unet": 2_567_463_684,
        "controlnet": 1_251_014_160,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "qwen-image-edit": {"transformer": 20_430_401_088, "text_encoder": 8_292_166_656, "vae": 126_892_531},
    "wan2.2-i2v-a14b": {
        "transformer": 14_288_901_184,
        "transformer_2": 14_288_901_184,
        "text_encoder": 5_680_910_336,
        "vae": 126_892_531,
    },
}


def _soaked(name: str) -> object:
    return name if name == "sdxl-controlnet" else pytest.param(name, marks=pytest.mark.soak)


@pytest.mark.parametrize("name", map(_soaked, PUBLISHED))
def test_the_networks_are_of_the_published_sizes(name: str) -> None:
    pipeline = weightless_teacher(str(SHAPES / name), fake_tensors())
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in modules_of(pipeline).items()}
    assert counts == PUBLISHED[name]
    assert {p.dtype for module in modules_of(pipeline).values() for p in module.parameters()} == {torch.float32}


@pytest.mark.soak
def test_the_tokens_of_an_edit_are_as_many_as_in_the_real_model() -> None:
    """Its pipeline cuts 64 tokens of a fixed text off; of a picture of 384 px there are 14 x 14."""
    mode = fake_tensors()
    pipeline = weightless_teacher(str(SHAPES / "qwen-image-edit"), mode)
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx == 64
    with answering(pipeline, mode) as taken:
        told, _ = pipeline.encode_prompt(image=[torch.zeros(3, 384, 384)], prompt="a photo", device="cpu")
    words = 12  # Picture 1 : <vision> </vision> a photo <end> \n <start> assistant \n
    assert told.shape == (1, words + 14 * 14, 3584)
    assert taken["text_encoder"] > 10 * told.nbytes


_PLAN = f"""
{PLAIN_TEXTS}
import resource, sys
from fewstep.cli import main
code = main(sys.argv[1:])
print("most", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_plan_of_a_real_model_takes_little_memory(name: str) -> None:
    """By the command of docs/editing.md. Nothing is computed; a recorder that kept all that it saw took over 8 GB."""
    flags = ["--lora_rank", "64", "--mixed_precision", "bf16", "--steps", "1", "--critic_updates", "1", "--cpu"]
    words = [sys.executable, "-c", _PLAN, "plan", str(SHAPES / name), "dmd2", *flags]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert "\nencoders       estimated: " in shown and "\npeak           estimated: " in shown
    assert int(shown.split("most")[-1]) * 1024 < 5e9
