"""Stock pipelines that are told pictures: recorded and proven, or refused in words that are true of each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_image
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXVideoToVideoPipeline,
    DiffusionPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionUpscalePipeline,
)
from diffusers.schedulers import DDPMScheduler
from PIL import Image

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.rescaling import Rescaling
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.watch.encoded_once import encoded_once

SOAK = pytest.mark.soak
#: All of the shown ones that are recorded without a second network in their loop.
RECORDED = zoo_image.first_is_quick(name for name in zoo_image.TRAINED if name != zoo_image.CONTROLLED)


def proven(pipeline: Any, items: list[dict[str, Any]], **call: Any) -> Recording:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = record(pipeline, items=items, **call)
        proof = recording.prove()
    errors = {check.name: check.error for check in proof.checks}
    assert errors["unguided, one sample"] <= 1e-6 and errors["unguided, another item and draw"] <= 1e-6
    assert errors["unguided, two items in one call"] <= 5e-6
    assert proof.swapped is not None and proof.swapped >= 1e-3
    if recording.further:
        assert errors["guided, each answer"] <= 1e-5 and errors["guided, combined"] <= 1e-5
    return recording


@pytest.mark.usefixtures("texts_as_they_are")
@pytest.mark.parametrize("name", RECORDED)
def test_shown_pipelines(name: str) -> None:
    recording = proven(zoo_image.load(name), zoo_image.items_of(name), **zoo_image.call_of(name))
    entry = zoo_image.MANIFEST[name]
    assert recording.inputs.keys() >= entry["inputs"].keys()
    assert recording.told is not None and bool(recording.told.draws) == ("drawn" in entry["mechanisms"])
    assert bool(recording.recipe.read.all()) == ("unread-entries" not in entry["mechanisms"])
    assert recording.call.get("strength", 1.0) == 1.0
    is_guided_as(entry, recording)


def is_guided_as(entry: dict[str, Any], recording: Recording) -> None:
    """As many answers as were counted, weighed as the entry says, and each told the picture that it says."""
    mechanisms, weighing = entry["mechanisms"], recording.guidance.weighing
    answers = entry["network_calls"] * entry["rows_per_call"] // entry["steps"]
    assert recording.further == answers - 1 == ("three-answers" in mechanisms) + 1
    assert weighing is not None and len(weighing.scales) == (0 if weighing.places else answers - 1)
    assert bool(weighing.places) == ("per-frame-guidance" in mechanisms)
    assert weighing.rescaled == (Rescaling("tokens") if "rescaled-guidance" in mechanisms else None)
    told = {"image-dropped": "zeros in the place", "negative-other-image": "another picture"}
    words = next((told[one] for one in mechanisms if one in told), "the item's picture")
    assert recording.guidance.pictures[-1].startswith(words)


def test_a_pipeline_that_pins_its_picture() -> None:
    pipeline = zoo_image.load("Inpaint4")
    words = (
        "the unet of StableDiffusionInpaintPipeline is told nothing of image, mask_image: .*; distil the text-to-image "
        "pipeline of the same network: its student's weights serve StableDiffusionInpaintPipeline"
    )
    with pytest.raises(RecordingError, match=words):
        record(pipeline, items=zoo_image.items_of("Inpaint4"), **zoo_image.call_of("Inpaint4"))


def _picture(number: int, size: int) -> Image.Image:
    draws = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Image.fromarray(draws.numpy()).resize((size, size), Image.Resampling.BICUBIC)


def _mask(number: int, size: int) -> Image.Image:
    mask = Image.new("L", (size, size), 0)
    mask.paste(255, (number % 3, 1, number % 3 + size // 2, 1 + size // 2))
    return mask


def _items(size: int, *masked: str, picture: str = "image", frames: int = 0) -> list[dict[str, Any]]:
    def shown(number: int) -> Any:
        return [_picture(number + 10 * k, size) for k in range(frames)] if frames else _picture(number, size)

    return [
        {"prompt": f"{word} boat", picture: shown(n), **{name: _mask(n, size) for name in masked}}
        for n, word in enumerate(("a", "the"))
    ]


def _parts(folder: Path, channels: int = 0, **changes: Any) -> dict[str, Any]:
    """A text-only pipeline's components, the network rebuilt with more input channels where some are asked for."""
    if not folder.is_dir():
        pytest.skip(f"needs {folder.name} of a folder of tiny pipelines")
    parts = dict(DiffusionPipeline.from_pretrained(folder, local_files_only=True).components)
    name = "unet" if "unet" in parts else "transformer"
    own = parts[name]
    if channels:
        known = {"out_channels": own.config.get("out_channels") or own.config.in_channels}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = type(own).from_config({**own.config, **known, **changes, "in_channels": channels})
            for parameter in network.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        parts[name] = network.eval()
    return parts


def _without(parts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: part for name, part in parts.items() if name not in names}


_FLUX = {"height": 8, "width": 8, "max_sequence_length": 48}
_COG = {"height": 16, "width": 16, "max_sequence_length": 16}


def _kontext(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    return FluxKontextPipeline(**_parts(zoo / "Flux")), _items(8), {**_FLUX, "max_area": 64, "_auto_resize": False}


def _fill(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    parts = _without(_parts(zoo / "Flux", channels=12), "image_encoder", "feature_extractor")
    return FluxFillPipeline(**parts), _items(8, "mask_image"), _FLUX


def _control(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    parts = _without(_parts(zoo / "Flux", channels=8), "image_encoder", "feature_extractor")
    return FluxControlPipeline(**parts), _items(8, picture="control_image"), _FLUX


def _inpaint9(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    parts = _parts(zoo / "StableDiffusion", channels=9)
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    return pipeline, _items(16, "mask_image"), {"height": 16, "width": 16}


def _upscale(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    parts = _parts(zoo / "StableDiffusion", channels=7, num_class_embeds=1000)
    parts = _without(parts, "image_encoder", "safety_checker", "feature_extractor")
    return StableDiffusionUpscalePipeline(**parts, low_res_scheduler=DDPMScheduler()), _items(16), {}


def _cog(zoo: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    return CogVideoXImageToVideoPipeline(**_parts(zoo / "CogVideoX", channels=8)), _items(16), {**_COG, "num_frames": 8}


@pytest.mark.soak
@pytest.mark.parametrize("made", [_kontext, _fill, _control, _inpaint9, _upscale, _cog])
def test_pipelines_made_of_text_only_ones(made: Any, zoo: Path) -> None:
    pipeline, items, call = made(zoo)
    proven(pipeline, items, **call)


@pytest.mark.soak
def test_references_of_other_sizes_need_no_other_recording(zoo: Path) -> None:
    """Kontext's tokens follow the picture's own size."""
    pipeline, items, call = _kontext(zoo)
    recording = proven(pipeline, items, **{**call, "max_area": 256})
    longer = [{"prompt": "a boat", "image": _picture(n, 16)} for n in range(2)]
    both = recording.condition_each(items=longer)
    assert not Conditioning.compatible(both[0], recording.condition_each(items=items)[0])
    x, at = torch.randn(2, *recording.sample_shape), torch.full((2,), 400.0, dtype=torch.float64)
    together = recording.recipe.call(recording.network, x, at, Conditioning.cat(both))
    alone = [recording.recipe.call(recording.network, x[n : n + 1], at[:1], both[n]) for n in range(2)]
    assert float((together - torch.cat(alone)).detach().abs().max()) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "of", "items", "call"),
    [
        (FluxInpaintPipeline, "Flux", _items(8, "mask_image"), _FLUX),
        (StableDiffusionImg2ImgPipeline, "StableDiffusion", _items(16), {}),
        (CogVideoXVideoToVideoPipeline, "CogVideoX", _items(16, picture="video", frames=8), _COG),
    ],
)
def test_pipelines_that_only_start_from_a_picture(kind: Any, of: str, items: Any, call: Any, zoo: Path) -> None:
    parts = _parts(zoo / of)
    pipeline = kind(**parts) if of != "StableDiffusion" else kind(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    made = "video" if "video" in items[0] else "image"
    words = (
        f"is told nothing of .*; distil the text-to-{made} pipeline of the same network: its student's weights serve"
    )
    with pytest.raises(RecordingError, match=words):
        record(pipeline, items=items, **call)


def test_every_picture_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = zoo_image.load("InstructPix2Pix")
    own, seen = pipeline.vae.encode, []

    def encode(pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(pixels)
        return own(pixels, *args, **kwargs)

    monkeypatch.setattr(pipeline.vae, "encode", encode)
    items = zoo_image.items_of("InstructPix2Pix")
    recording = record(pipeline, items=items, **zoo_image.call_of("InstructPix2Pix"))
    assert len(seen) == 2 and not torch.equal(*seen)
    assert pipeline.vae.encode is encode
    recording.prove()
    assert len(seen) == 2, "the proof encodes what was encoded for the recording"
    one, two = recording.condition_each(items=items)
    again = recording.condition_each(items=items)[0]
    told = [conditioning.arguments()["sample"] for conditioning in (one, two, again)]
    assert len(seen) == 6 and torch.equal(told[0], told[2]) and not torch.equal(told[0], told[1])


def test_what_was_encoded_counts_for_the_same_weights_alone() -> None:
    pipeline, seen, known = zoo_image.load("InstructPix2Pix"), [], {}
    own = pipeline.vae.encode
    pipeline.vae.encode = lambda pixels: seen.append(pixels) or own(pixels)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)

    def made() -> torch.Tensor:
        with encoded_once(pipeline, known), torch.no_grad():
            return pipeline.vae.encode(pixels).latent_dist.mean

    first = made()
    assert torch.equal(first, made()) and len(seen) == 1
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(1.5)
    assert not torch.equal(first, made()) and len(seen) == 2
    pipeline.vae.encoder.conv_in.weight.data = torch.zeros_like(pipeline.vae.encoder.conv_in.weight)
    made()
    assert len(seen) == 3
