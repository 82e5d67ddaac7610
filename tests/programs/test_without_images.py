"""An editing teacher that also works without a picture: it is recorded so where somebody says so, and not else."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import Flux2KleinPipeline, FluxKontextPipeline, FluxPipeline, StableDiffusionPipeline
from item_sets import picture, tiny_editor

from fewstep.data.items import read_items
from fewstep.errors import UserError
from fewstep.programs.given_items import record_for


def recorded(pipeline_class: type, **how: bool) -> list[Any]:
    """What the recorder is asked for."""
    asked: list[Any] = []
    pipeline: Any = pipeline_class.__new__(pipeline_class)
    record_for(lambda pipeline, **call: asked.append(call), pipeline, {"height": 8}, None, **how)  # type: ignore[func-returns-value, arg-type]
    return asked


@pytest.mark.parametrize("pipeline_class", [FluxKontextPipeline, Flux2KleinPipeline])
def test_prompts_alone_are_refused_with_the_flag_to_give(pipeline_class: type) -> None:
    with pytest.raises(UserError, match=r"is told pictures \(image\).*--items.*--prompts --without_images") as caught:
        recorded(pipeline_class)
    assert "\n" not in str(caught.value)
    assert recorded(pipeline_class, without_images=True) == [{"height": 8}]
    assert recorded(pipeline_class, without_images=True, make_up=True) == [{"height": 8}], "no picture is made up"


@pytest.mark.parametrize("pipeline_class", [StableDiffusionPipeline, FluxPipeline])
def test_a_text_teacher_is_asked_for_nothing(pipeline_class: type) -> None:
    assert recorded(pipeline_class) == [{"height": 8}]


def test_items_hold_pictures() -> None:
    items = read_items([{"prompt": "a", "image": picture(number)} for number in range(2)], type(tiny_editor()))
    with pytest.raises(UserError, match="--without_images is of --prompts, and items hold pictures"):
        record_for(lambda *_: None, tiny_editor(), {}, items, without_images=True)  # type: ignore[arg-type, return-value]
