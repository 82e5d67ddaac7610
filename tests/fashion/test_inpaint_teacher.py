"""The inpainting teacher is a stock pipeline that fills holes: it keeps what is given, and looks at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.errors import UserError
from fewstep.eval import evaluate
from fewstep.eval.fashion.evaluate import given
from fewstep.eval.scorers.kept import kept
from fewstep.fashion import TEACHERS, TEXT_TEACHERS, load_classifier, teacher_path
from fewstep.fashion.classifier import extract
from fewstep.fashion.items import inpainting_items
from fewstep.teachers.loading import load_teacher

NAME = "fashion-inpaint"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = load_teacher(NAME)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def filled(pipeline: Any, items: list[Item], steps: int = 4) -> Tensor:
    """Samples (N, 3, 32, 32) in [0, 1], of one noise for all."""
    generators = [torch.Generator().manual_seed(0) for _ in items]
    arguments = {name: [item.arguments[name] for item in items] for name in items[0].arguments}
    call = {"num_inference_steps": steps, "guidance_scale": TEACHERS[NAME].guidance_scale, "output_type": "pt"}
    images: Tensor = pipeline(**arguments, **call, generator=generators).images
    return images


def test_a_stock_pipeline_in_single_precision_that_is_asked_by_name(pipeline: Any) -> None:
    assert type(pipeline) is StableDiffusionInpaintPipeline and pipeline.unet.config.in_channels == 9
    assert isinstance(DiffusionPipeline.from_pretrained(teacher_path(NAME)), StableDiffusionInpaintPipeline)
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for part in modules for parameter in part.parameters()} == {torch.float32}
    assert NAME in TEACHERS and NAME not in TEXT_TEACHERS


def test_its_evaluation_asks_for_held_back_pictures_by_itself(tmp_path: Path) -> None:
    """Beside the agreement with the prompt: how much is kept of what was given."""
    options = {"teacher": NAME, "teacher_steps": (1,), "num": 20, "images": "shown", "device": "cpu"}
    report = evaluate([], out=tmp_path / "own", metrics=("fd_test", "agreement", "kept"), **options)
    (row,) = report.rows
    assert row["nfe"] == 2 and set(row["metrics"]) == {"fd_test", "agreement", "kept"}
    assert report.conditions["kind"] == "item" and 0.8 < row["metrics"]["kept"] < 1
    with pytest.raises(UserError, match="none were given"):
        evaluate([], out=tmp_path / "prompts", prompts=["a photo of a bag"], **options)
    text = evaluate([], out=tmp_path / "text", metrics=("agreement", "kept"), **{**options, "teacher": "fashion-sd"})
    assert set(text.rows[0]["metrics"]) == {"agreement"} and any("mask of its hole" in one for one in text.skipped)


def test_it_shows_what_was_asked_and_keeps_what_was_given(pipeline: Any) -> None:
    items = inpainting_items(30, seed=1)
    images = filled(pipeline, items)
    assert images.shape == (30, 3, 32, 32) and images.isfinite().all()
    grey = (images * 255).round().byte()
    assert (grey - grey[:, :1]).abs().max() == 0, "three equal channels"
    _, logits = extract(load_classifier(), images[:, :1])
    assert (logits.argmax(1) == torch.arange(30) % 10).double().mean() > 0.85
    pictures, holes = given(items)
    blind = kept(pictures.roll(10, dims=0), pictures, holes).mean()
    assert kept(grey, pictures, holes).mean() > 1 - 0.7 * (1 - blind)


def test_another_picture_gives_another_sample_and_the_hole_is_never_seen(pipeline: Any) -> None:
    one, other = inpainting_items(11, seed=2)[0], inpainting_items(11, seed=2)[10]
    of_other = Item({**other.arguments, "mask_image": one.arguments["mask_image"]})
    _, holes = given([one])
    pixels = np.asarray(one.arguments["image"]).copy()
    pixels[holes[0, 0].numpy()] = 200
    repainted = Item({**one.arguments, "image": PIL.Image.fromarray(pixels)})
    first, second, third = filled(pipeline, [one, of_other, repainted], steps=2)
    assert (first - second).abs().mean() > 0.02
    torch.testing.assert_close(first, third, rtol=0, atol=1e-5)
