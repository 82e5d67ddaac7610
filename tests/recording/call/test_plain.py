"""A call is recorded as JSON gives it back, for so the student's users get it."""

from __future__ import annotations

import enum
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline
from tiny_pipelines import tiny_stable_diffusion

from fewstep.recording import RecordingError, record
from fewstep.recording.call.plain import as_taken, plain_call


def test_tuples_come_back_where_the_pipeline_wants_them() -> None:
    call = {"original_size": (64, 32), "crops_coords_top_left": [0, 8], "guidance_scale": 5.0}
    taken = plain_call(StableDiffusionXLPipeline, call)
    assert taken == {"original_size": (64, 32), "crops_coords_top_left": (0, 8), "guidance_scale": 5.0}
    assert as_taken(StableDiffusionXLPipeline, {"sigmas": [1.0, 0.5]}) == {"sigmas": [1.0, 0.5]}
    assert plain_call(FluxPipeline, {"joint_attention_kwargs": {"a": (1, 2)}}) == {
        "joint_attention_kwargs": {"a": [1, 2]}
    }


class _Nested:
    def __call__(
        self,
        areas: list[tuple[int, int]] | None = None,
        pairs: tuple[tuple[int, ...], ...] = (),
        either: list[int] | tuple[int, ...] | None = None,
        unstated=(1, 2),
    ) -> None: ...


class _Unresolved:
    """One annotation names what is not there."""

    def __call__(
        self,
        area: "NotThere | None" = None,  # noqa: F821, UP037
        unstated: Any = None,
        corner: "NotThere" = (0, 0),  # noqa: F821, UP037
        size: tuple[int, int] | None = None,
    ) -> None: ...


def test_tuples_inside_of_others_and_by_default_value() -> None:
    call = {"areas": [(1, 2), (3, 4)], "pairs": [[1, 2], [3]], "either": (1, 2), "unstated": [3, 4]}
    assert plain_call(_Nested, call) == {
        "areas": [(1, 2), (3, 4)],
        "pairs": ((1, 2), (3,)),
        "either": [1, 2],
        "unstated": (3, 4),
    }
    call = {"area": (1,), "unstated": (2,), "corner": [3], "size": [4, 5]}
    assert plain_call(_Unresolved, call) == {"area": [1], "unstated": [2], "corner": (3,), "size": (4, 5)}


class _Style(enum.StrEnum):
    PLAIN = "plain"


@pytest.mark.parametrize(
    ("given", "plain"),
    [(np.float32(2.5), 2.5), (np.int64(3), 3), (torch.tensor(4), 4), (np.bool_(True), True), (_Style.PLAIN, "plain")],
)
def test_numbers_of_other_libraries_become_plain_ones(given: Any, plain: Any) -> None:
    found = plain_call(_Unresolved, {"unstated": given})["unstated"]
    assert found == plain and type(found) is type(plain)
    assert plain_call(_Unresolved, {"unstated": {"scale": [given]}})["unstated"] == {"scale": [plain]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2), "is a Tensor, which JSON"),
        ([np.zeros(2)], "is a list of ndarray, which JSON"),
        ({1: 2}, "has the key 1, and JSON has texts as keys only"),
        ([{"a": {2: 3}}], "has the key 2"),
        ({1, 2}, "is a set, which JSON"),
        (math.nan, "is not finite"),
        ([1.0, -math.inf], "is not finite"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_runs(value: Any, words: str) -> None:
    with pytest.raises(RecordingError, match=f"the argument cross_attention_kwargs of the call {words}") as caught:
        record(tiny_stable_diffusion(), prompt="the cat", cross_attention_kwargs=value)
    assert "\n" not in str(caught.value)
