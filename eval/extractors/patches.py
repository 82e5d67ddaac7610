"""Patches of large images at their own resolution, as the Inception network sees them."""

from __future__ import annotations

from torch import Tensor

from fewstep.eval.features import Extractor, Features
from fewstep.eval.metrics.patch_fid import SIDE, SMALLEST, centre_patches


class PatchExtractor:
    """The features of each image's middle (:func:`fewstep.eval.metrics.patch_fid.centre_patches`).

    Args:
        inner: the extractor that looks at the patches, which need no resize for it.
    """

    def __init__(self, inner: Extractor) -> None:
        self._inner = inner
        self.name, self.sha256, self.verified = inner.name, inner.sha256, inner.verified
        self.resize = f"none: the middle {SIDE}x{SIDE} pixels"

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Images of 512 pixels or more on each side."""
        return self._inner.accepts((shape[0], SIDE, SIDE)) and min(shape[-2:]) >= SMALLEST

    def __call__(self, images: Tensor) -> Features:
        """uint8 (N, C, H, W) -> the inner one's features of the patches."""
        return self._inner(centre_patches(images))
