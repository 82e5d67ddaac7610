"""What a cache knows its teacher by: the same everywhere, and another one for every change that decides something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import tiny_flow, tiny_stable_diffusion

from fewstep.data.fingerprint import fingerprint
from fewstep.recording import record

_ELSEWHERE = """
import json, sys, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from fewstep.data.fingerprint import fingerprint
from fewstep.recording import record
print(json.dumps(fingerprint(record(DiffusionPipeline.from_pretrained(sys.argv[1]), prompt="a"))))
"""


def of(pipeline: Any, **call: Any) -> dict[str, str]:
    return fingerprint(record(pipeline, prompt="the cat", **call))


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.mark.soak
def test_it_does_not_depend_on_the_process(tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(tmp_path)
    words = [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(tmp_path)]
    elsewhere = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert of(pipeline) == json.loads(elsewhere)


def test_it_depends_neither_on_the_folder_nor_on_earlier_calls(tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(tmp_path / "named otherwise")
    mine = of(pipeline)
    assert mine == of(DiffusionPipeline.from_pretrained(tmp_path / "named otherwise"))
    pipeline("a", num_inference_steps=2, output_type="np")  # a call leaves its traces in a tokenizer
    assert mine == of(pipeline)


def _more_vocabulary(pipeline: Any) -> None:
    pipeline.tokenizer.add_tokens(["new"])


def _last_weight(part: str) -> Callable[[Any], None]:
    def change(pipeline: Any) -> None:
        with torch.no_grad():
            list(getattr(pipeline, part).parameters())[-1].view(-1)[-1].add_(1e-3)

    return change


def _all_weights(pipeline: Any) -> None:
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.001)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_last_weight("text_encoder"), "text_encoder"),
        (_more_vocabulary, "tokenizer"),
        (lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", 9), "tokenizer"),
        (lambda pipeline: setattr(pipeline.text_encoder.config, "hidden_act", "relu"), "text_encoder"),
        (_all_weights, "unet"),
        (lambda pipeline: pipeline.scheduler.register_to_config(beta_end=0.02), "scheduler"),
    ],
)
def test_every_change_shows_in_its_part(change: Callable[[Any], None], part: str) -> None:
    pipeline = tiny_stable_diffusion()
    recording = record(pipeline, prompt="the cat")
    before = fingerprint(recording)
    change(pipeline)
    assert differing(before, fingerprint(recording)) == [part]


def test_of_the_call_counts_what_the_network_is_told() -> None:
    """A guidance scale decides nothing before the network, and a default may be given or not."""
    pipeline = tiny_stable_diffusion()
    plain = of(pipeline)
    for call in ({"guidance_scale": 4, "clip_skip": None}, {"eta": 0}):
        assert of(pipeline, **call) == plain
    for call in ({"negative_prompt": "b"}, {"height": 32, "width": 32}):
        assert differing(of(pipeline, **call), plain) == ["call"]


def test_every_text_encoder_counts() -> None:
    parts = of(tiny_flow(), height=16, width=16)
    assert {f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")} < parts.keys()
    assert "vae" not in parts
