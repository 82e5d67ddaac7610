"""Pictures as published networks see them, compared to the bit with the libraries that their authors used."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from fewstep.eval.scorers.pixels import (
    DEVIATION,
    MEAN,
    clip_pixels,
    gigagan_pixels,
    normalised,
    padded_pixels,
    transformers_pixels,
)

SIZES = [(47, 70), (300, 224), (512, 512), (641, 333), (64, 64), (224, 224), (224, 301)]


def pictures(size: tuple[int, int], channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    noise = torch.randint(0, 256, (2, channels, *size), dtype=torch.uint8, generator=generator).float()
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1).to(torch.uint8)


def images(batch: Tensor) -> list[Image.Image]:
    return [transforms.functional.to_pil_image(picture) for picture in batch]


def openai() -> transforms.Compose:
    """OpenAI's and open_clip's chain."""
    return transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_clip_is_torchvisions_chain(size: tuple[int, int], channels: int) -> None:
    batch = pictures(size, channels)
    expected = torch.stack([openai()(image) for image in images(batch)])
    assert torch.equal(normalised(clip_pixels(batch, 224)), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gigagans_is_theirs(size: tuple[int, int]) -> None:
    batch = pictures(size)
    squares = [transforms.functional.center_crop(image, min(image.size)) for image in images(batch)]
    small = [square.resize((256, 256), Image.Resampling.LANCZOS) for square in squares]
    assert torch.equal(normalised(gigagan_pixels(batch, 224)), torch.stack([openai()(image) for image in small]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pickscores_is_transformers(size: tuple[int, int]) -> None:
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    batch = pictures(size)
    processor = module.CLIPImageProcessorPil()
    expected = processor(images(batch), return_tensors="pt")["pixel_values"]
    assert (normalised(transformers_pixels(batch, 224)) - expected).abs().max() < 1e-6


def test_the_two_centres_differ_where_a_half_margin_is_odd() -> None:
    """227 - 224 leaves a margin of 1.5: torchvision begins at 2, transformers at 1."""
    batch = pictures((224, 227))
    assert torch.equal(clip_pixels(batch, 224), batch[..., 2:226].float() / 255)
    assert torch.equal(transformers_pixels(batch, 224), batch[..., 1:225].float() / 255)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hps_fits_the_longer_side_and_pads_with_black(size: tuple[int, int]) -> None:
    """torchvision's resize of a scaled tensor, as HPSv2 calls it, and its padding."""
    batch = pictures(size)
    scale = 224 / max(size)
    inner = [round(side * scale) for side in size]
    resized = transforms.functional.resize(batch.float() / 255, inner, transforms.InterpolationMode.BICUBIC)
    top, left = ((224 - side) // 2 for side in inner)
    found = padded_pixels(batch, 224)
    assert found.shape == (2, 3, 224, 224)
    assert torch.equal(found[..., top : top + inner[0], left : left + inner[1]], resized)
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[top : top + inner[0], left : left + inner[1]] = False
    assert (found[..., outside] == 0).all()
