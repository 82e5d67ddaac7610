"""Sizes and other numbers of a call that no pipeline can mean are refused in one line, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import CogVideoXPipeline, DDIMPipeline, StableDiffusionXLPipeline, WanPipeline
from tiny_pipelines import TINY, tiny_ddim, tiny_flow, tiny_stable_diffusion, tiny_wan

from fewstep.cli import main
from fewstep.recording import RecordingError, record
from fewstep.recording.call.numbers import refuse_impossible


def _refused(pipeline: Any, words: str, **call: Any) -> None:
    with pytest.raises(RecordingError, match=words) as caught:
        record(pipeline, **call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"height": -8}, "height of StableDiffusionPipeline is a number from 1 up, not -8; mend the call"),
        ({"height": 16, "width": 0}, "width of .* from 1 up, not 0"),
        ({"height": 16.0, "width": 16}, "height of .* is a whole number from 1 up, not 16.0"),
        ({"height": "16"}, "height of .* is a whole number from 1 up, not '16'"),
        ({"width": True}, "width of .* is a whole number"),
        ({"guidance_scale": -1.0}, "guidance_scale of .* from 0 up, not -1.0"),
        ({"guidance_rescale": 1.5}, "guidance_rescale of .* is a number from 0 to 1, not 1.5"),
        ({"eta": -0.1}, "eta of .* from 0 up"),
        ({"eta": 1.1}, "eta of .* from 0 to 1"),
        ({"clip_skip": -1}, "clip_skip of .* from 0 up, not -1"),
        ({"num_inference_steps": 0}, "num_inference_steps of .* from 1 up, not 0"),
        ({"num_inference_steps": -4}, "num_inference_steps of .* from 1 up, not -4"),
        ({"guidance_scale": float("nan")}, "guidance_scale of the call is not finite"),
    ],
)
def test_numbers_out_of_range(call: dict[str, Any], words: str) -> None:
    _refused(tiny_stable_diffusion(), words, prompt="the cat", **call)


@pytest.mark.parametrize(
    ("pipeline", "call", "words"),
    [
        (tiny_wan, {"num_frames": 0, "height": 16, "width": 16}, "num_frames of WanPipeline .* from 1 up, not 0"),
        (tiny_flow, {"max_sequence_length": -1}, "max_sequence_length of .* from 1 up, not -1"),
        (tiny_ddim, {"eta": 2}, "eta of DDIMPipeline is a number from 0 to 1, not 2"),
    ],
)
def test_numbers_of_other_pipelines(pipeline: Any, call: dict[str, Any], words: str) -> None:
    _refused(pipeline(), words, **call)


def test_numbers_that_are_right() -> None:
    refuse_impossible(StableDiffusionXLPipeline, {"crops_coords_top_left": (0, 0), "original_size": (64, 64)})
    refuse_impossible(CogVideoXPipeline, {"num_frames": 1, "guidance_scale": 0, "eta": 1.0})
    refuse_impossible(WanPipeline, {"guidance_scale_2": None, "attention_kwargs": {"offset": -3}})
    refuse_impossible(DDIMPipeline, {"eta": 0, "use_clipped_model_output": None})
    with pytest.raises(RecordingError, match=r"original_size of .* from 1 up, not \(64, 0\)"):
        refuse_impossible(StableDiffusionXLPipeline, {"original_size": (64, 0)})


@pytest.mark.parametrize("size", [{"height": 24}, {"width": 24}])
def test_a_size_that_the_pipeline_passes_over(size: dict[str, int]) -> None:
    """Stable Diffusion takes its own default for both where one is missing."""
    (name,) = size
    _refused(tiny_stable_diffusion(), f"the same samples with {name}=24 and without it; give height and width", **size)


def test_a_single_size_that_the_pipeline_heeds() -> None:
    recording = record(tiny_flow(), prompt="the cat", height=32, max_sequence_length=8)
    assert recording.sample_shape == (4, 16, 8)


def test_pipelines_of_all_kinds_still_record() -> None:
    for build, call in TINY.values():
        record(build(), **call)


@pytest.mark.parametrize("call", ['{"height": -8}', '{"height": -8, "width": -8}', '{"guidance_scale": NaN}'])
def test_the_command_line_refuses_them(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "fashion-sd", "--call", call]) == 2
    error = capsys.readouterr().err
    assert error.count("fewstep: ") == 1 and "Traceback" not in error
