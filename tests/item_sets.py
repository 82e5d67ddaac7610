"""A tiny pipeline that looks at a picture, and items for such: prompts with pictures, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_pipelines import tiny_stable_diffusion


def tiny_editor() -> StableDiffusionInstructPix2PixPipeline:
    """Prompts with a picture each, latents (4, 8, 8) of pictures of 16 pixels, epsilon: channels beside the sample."""
    parts = tiny_stable_diffusion().components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=8).eval()
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_filler() -> StableDiffusionInpaintPipeline:
    """The same that fills holes: a picture and its mask, nine channels in."""
    parts = tiny_stable_diffusion().components
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9).eval()
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Smooth, so that an encoder sees structure."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def write_items(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((16, 16),)) -> Path:
    """``items.jsonl`` with ``count`` rows, a prompt and a picture each, of these sizes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        picture(number, sizes[number % len(sizes)]).save(folder / f"{number}.png")
        rows.append({"prompt": f"the {'abcdefgh'[number % 8]}", "image": f"{number}.png"})
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "items.jsonl"
