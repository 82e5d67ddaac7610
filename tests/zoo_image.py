"""The folder of tiny pipelines that are told pictures, where it lies beside the checkout, and items for them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "zoo-image"
MANIFEST: dict[str, dict[str, Any]] = (
    json.loads((FOLDER / "manifest.json").read_text()) if (FOLDER / "manifest.json").is_file() else {}
)
#: Those whose walk starts from noise alone: they are recorded, guided, walked and trained. The first takes least.
TRAINED = (
    "InstructPix2Pix",
    "InpaintXL9",
    "LTXImageToVideo",
    "Wan22TI2V",
    "WanFirstLastFrame",
    "HunyuanVideoImageToVideo",
    "QwenImageEditPlus",
    "ControlNetXL",
    "StableVideoDiffusion",
)
#: Among these, that with a second network in its loop.
CONTROLLED = "ControlNetXL"
#: QwenImageEditPlus brings every reference to 1024 times 1024 pixels, and its encoder would take most of a test for it.
REFERENCES = 64 * 64
#: The same in a program.
SMALL_REFERENCES = f"""
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = {REFERENCES}
"""


def first_is_quick(names: Iterable[str]) -> list[Any]:
    """The cases of a test: the first name runs always, the others are for soak runs."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.soak) for name in others)]


def load(name: str) -> Any:
    """One of its pipelines; skips the test where there is no such folder."""
    if name not in MANIFEST:
        pytest.skip("needs the folder of tiny pipelines with pictures")
    pipeline = DiffusionPipeline.from_pretrained(FOLDER / name, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_of(name: str) -> dict[str, Any]:
    """Its call, prompt apart."""
    return {key: value for key, value in MANIFEST[name]["call"].items() if key != "prompt"}


def items_of(name: str, count: int = 2, prompt: str | None = None) -> list[dict[str, Any]]:
    """Items with pictures of their own, and prompts of their own or the one that is given."""
    spec = importlib.util.spec_from_file_location("zoo_image_inputs", FOLDER / "inputs.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    entry = MANIFEST[name]
    own = entry["call"].get("prompt")
    items = []
    for number in range(count):
        words = prompt or f"{own} {'abcdefgh'[number % 8]}"
        pictures = {key: made.make(spec, 20 * number + k) for k, (key, spec) in enumerate(entry["inputs"].items())}
        items.append({**({} if own is None else {"prompt": words}), **pictures})
    return items
