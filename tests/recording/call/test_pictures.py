"""Teachers that are told pictures, masks or videos are refused without items, in words that are true of each."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    LTXConditionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    WanVACEPipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from synthetic import TraitPipeline, synthetic
from tiny_pipelines import tiny_stable_diffusion

from fewstep.recording import RecordingError, record
from fewstep.recording.call.pictures import picture_arguments
from tests.recording.synthetic_parts import Traits

ZOO_IMAGE = Path(__file__).resolve().parents[4] / "shared" / "zoo-image"
MANIFEST = json.loads((ZOO_IMAGE / "manifest.json").read_text()) if ZOO_IMAGE.is_dir() else {}
BY_ITEMS = r"a picture, a mask or a video is one sample's own and comes with items .*; if its network also works"


def _refused(pipeline: Any, words: str, **call: Any) -> str:
    with pytest.raises(RecordingError, match=words) as caught:
        record(pipeline, **call)
    text = str(caught.value)
    assert "\n" not in text and "more than one answer" not in text and "few-step" not in text
    return text


def _picture() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (16, 16), "gray")


def _loaded(folder: Path) -> Any:
    if not folder.is_dir():
        pytest.skip(f"needs {folder.name} of a folder of tiny pipelines")
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "name", list(MANIFEST) or [pytest.param("none", marks=pytest.mark.skip(reason="no pipelines"))]
)
def test_pipelines_with_pictures(name: str) -> None:
    """Bare, with their pictures, and with paths, which are all that a command line can give."""
    pipeline, entry = _loaded(ZOO_IMAGE / name), MANIFEST[name]
    pictures = dict.fromkeys(entry["inputs"], _picture())
    given = ", ".join(entry["inputs"])
    _refused(pipeline, f"{entry['pipeline']} was given {given}: {BY_ITEMS}", **entry["call"], **pictures)
    _refused(pipeline, f"was given {given}: {BY_ITEMS}", **entry["call"], **dict.fromkeys(pictures, "photo.png"))
    first = next(iter(pictures))
    required = inspect.signature(type(pipeline).__call__).parameters[first].default is inspect.Parameter.empty
    words = f"requires {first}: " if required else f"failed under the recorder: .*; if it is for want of {first}.*: "
    _refused(pipeline, words + BY_ITEMS, **entry["call"])


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.5, 0.25])
def test_a_video_to_start_from(zoo: Path, strength: float) -> None:
    pipeline = CogVideoXVideoToVideoPipeline(**_loaded(zoo / "CogVideoX").components)
    call = {"prompt": "a", "height": 16, "width": 16, "strength": strength}
    _refused(pipeline, f"was given video: {BY_ITEMS}", video=[_picture()] * 8, **call)
    _refused(pipeline, f"was given video: {BY_ITEMS}", video=["one.png"] * 8, **call)


class _OwnStart(TraitPipeline):
    """Starts from a picture of its own, which no argument shows, unless strength is 1."""

    def __call__(self, prompt: Any, strength: float = 1.0, num_inference_steps: int = 8, **rest: Any) -> Any:
        self.strength = strength
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **rest)

    def _times(self) -> torch.Tensor:
        times = super()._times()
        return times[len(times) - int(len(times) * self.strength) :]


@pytest.mark.parametrize(("strength", "skipped"), [(0.75, 1), (0.5, 2), (0.25, 3)])
def test_a_start_that_no_argument_shows(strength: float, skipped: int) -> None:
    pipeline = _OwnStart(**synthetic(Traits(guidance="none")).components)
    words = (
        rf"starts at timestep [\d.]+, {skipped} of 4 steps after the first of its scheduler .1000.: it does not start"
    )
    _refused(pipeline, words, prompt="a cat", strength=strength)
    record(pipeline, prompt="a cat", strength=1.0).prove()


def test_a_walk_of_no_steps() -> None:
    pipeline = _OwnStart(**synthetic(Traits(guidance="none")).components)
    _refused(pipeline, "made no step of its scheduler", prompt="a cat", strength=0.0)


def test_a_time_for_every_token() -> None:
    """Without a picture they are all the same; with one it is to come with items."""
    pipeline = LTXConditionPipeline(**_loaded(ZOO_IMAGE / "LTXImageToVideo").components)
    call = MANIFEST["LTXImageToVideo"]["call"]
    record(pipeline, **call)
    condition = LTXVideoCondition(image=_picture(), frame_index=0)
    for given in (condition, [condition]):
        _refused(pipeline, f"was given conditions: {BY_ITEMS}", conditions=given, **call)


def test_editing_pipelines_are_recorded_without_a_picture(zoo: Path) -> None:
    """They serve as text to image."""
    pipeline = FluxKontextPipeline(**_loaded(zoo / "Flux").components)
    call = {"prompt": "a", "height": 8, "width": 8, "max_sequence_length": 48, "max_area": 64}
    assert record(pipeline, **call).conditional == "prompt"
    _refused(pipeline, f"was given image: {BY_ITEMS}", image=torch.zeros(1, 3, 8, 8), **call)


@pytest.mark.parametrize("name", ["Sana", "HunyuanVideo"])
def test_a_scheduler_that_does_not_fit_is_not_a_want_of_pictures(zoo: Path, name: str) -> None:
    """Neither tells its scheduler a shift by the size, as Flux does."""
    pipeline = _loaded(zoo / name)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    text = _refused(pipeline, "its FlowMatchEulerDiscreteScheduler raised that, so its configuration may not fit")
    assert "mu" in text and "check the arguments" not in text and "for want of" not in text


def test_ip_adapters() -> None:
    pipeline = tiny_stable_diffusion()
    for picture in (_picture(), np.zeros((8, 8, 3)), "photo.png"):
        _refused(pipeline, f"was given ip_adapter_image: {BY_ITEMS}", prompt="a", ip_adapter_image=picture)
    pipeline.unet.encoder_hid_proj = torch.nn.Identity()
    _refused(pipeline, "the unet of StableDiffusionPipeline has an IP-Adapter.*unload_ip_adapter", prompt="a")


def test_control_networks() -> None:
    pipeline = tiny_stable_diffusion()
    control = ControlNetModel.from_unet(pipeline.unet)
    pipeline = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=control, requires_safety_checker=False
    )
    _refused(pipeline, f"for want of image: {BY_ITEMS}", prompt="the cat")
    call = {"prompt": "the cat", "image": _picture(), "controlnet_conditioning_scale": 0.5}
    _refused(pipeline, f"was given image: {BY_ITEMS}", **call)


def test_a_failure_that_has_nothing_to_do_with_pictures() -> None:
    text = _refused(tiny_stable_diffusion(), "divisible by 8", prompt="a", height=17, width=16)
    assert text.endswith("; check the arguments of the call")


def test_a_package_that_is_missing() -> None:
    class Lacking(TraitPipeline):
        def _ask(self, *_: Any) -> Any:
            return ftfy_that_is_not_there  # noqa: F821

    words = "NameError.*; install ftfy_that_is_not_there, which this pipeline uses"
    _refused(Lacking(**synthetic(Traits()).components), words, prompt="a cat")


def test_which_arguments_take_pictures() -> None:
    assert picture_arguments(StableDiffusionPipeline) == ["ip_adapter_image", "ip_adapter_image_embeds"]
    assert picture_arguments(StableDiffusionImg2ImgPipeline)[0] == "image"
    assert picture_arguments(LTXConditionPipeline) == ["conditions", "image", "video"]
    assert {"video", "mask", "reference_images"} <= set(picture_arguments(WanVACEPipeline))
    assert not {"prompt", "num_images_per_prompt", "guidance_scale"} & set(picture_arguments(FluxPipeline))


class _TwoScales(TraitPipeline):
    """Guided by default; with that off, one answer to a sample that is mixed with something else."""

    def __call__(self, prompt: Any, other_guidance_scale: float = 3.0, guidance_scale: float = 1.0, **rest: Any) -> Any:
        return super().__call__(prompt, guidance_scale=other_guidance_scale, **rest)

    def _ask(self, x: Any, *rest: Any) -> Any:
        return super()._ask(x * 0.5 + 1, *rest)


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
def test_a_sample_that_is_not_found_is_not_called_a_second_answer(guidance: str) -> None:
    class Stepped(_TwoScales):
        def __call__(
            self, prompt: Any, num_inference_steps: int = 8, other_guidance_scale: float = 3.0, **rest: Any
        ) -> Any:
            return super().__call__(prompt, other_guidance_scale, num_inference_steps=num_inference_steps, **rest)

    pipeline = Stepped(**synthetic(Traits(guidance=guidance)).components)
    _refused(pipeline, "no argument of network equals the sample", prompt="a cat")
