"""Perceptual distance of samples: LPIPS (Zhang et al. 2018) between the images that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.recording.pipeline import evaluating

#: What LPIPS is asked at; smaller and larger images are resized to it (Song et al. 2023; Lee et al. 2024).
_SIDE = 224


class PerceptualDistance:
    """A distance (B,) of two batches x0, with gradient to both.

    Args:
        distance: of images (B, 3, 224, 224) in [0, 1]; (B,).
        images: from x0 (B, ...) to images (B, C, H, W), [0, 1] where they are within the pipeline's range.
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], images: Callable[[Tensor], Tensor]) -> None:
        self.distance, self.images = distance, images

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance (B,) of ``a`` and ``b``, both x0 (B, ...)."""
        return self.distance(self._enlarged(a), self._enlarged(b))

    def _enlarged(self, x0: Tensor) -> Tensor:
        images = self.images(x0)
        return F.interpolate(images, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)


def lpips_of(recording: Recording, device: torch.device | str) -> PerceptualDistance:
    """LPIPS (VGG) between the images that a teacher's pipeline makes of x0, latents decoded with gradient.

    Raises:
        UserError: the lpips package is not installed, its weights cannot be had, or the teacher makes videos.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise UserError(
            "--perceptual_weight needs the lpips package: pip install 'fewstep[perceptual]', or leave the weight at 0"
        ) from error
    try:
        network = LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    except OSError as error:  # torchvision fetches VGG once
        raise UserError(f"LPIPS cannot have its VGG weights: {error}; fetch them once with a network") from error

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x.expand(-1, 3, -1, -1).float() for x in (a, b))
        return network(a, b, normalize=True).flatten()

    return PerceptualDistance(distance, images_of(recording))


def images_of(
    recording: Recording, who: str = "--perceptual_weight compares", instead: str = "leave it out"
) -> Callable[[Tensor], Tensor]:
    """The differentiable way from x0 (B, ...) to images (B, C, H, W) in [0, 1], without the pipeline's clipping.

    ``who`` wants them, and ``instead`` is what else can be done, for the error.

    Raises:
        UserError: the teacher makes videos, its samples are of several sizes, or a part of its images comes from its
            items.
    """
    codec = recording.codec
    if recording.sizes:
        raise UserError(
            f"{who} images of one size, and the items' samples are of {1 + len(recording.sizes)}: give items of one "
            f"size, or {instead}"
        )
    if len(codec.shape) != 3:
        raise UserError(f"{who} images, and this teacher makes videos; {instead}")
    if codec.tail is not None:
        raise UserError(f"{who} images of samples, and a part of this teacher's comes from its items; {instead}")
    if codec.decoder is None:
        return codec.to_decoder
    decoder = getattr(recording.pipeline, codec.decoder)

    def decoded(x0: Tensor) -> Tensor:
        z = codec.to_decoder(x0).to(next(decoder.parameters()).dtype)
        with evaluating(decoder):
            pixels = decoder.decode(z, return_dict=False)[0].float()
        return pixels / 2 + 0.5 if codec.centred else pixels

    return decoded
