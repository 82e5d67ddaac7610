"""Patches of large images, whose Fréchet distance sees the blur that a resize to 299x299 hides."""

from torch import Tensor

#: Side of a patch: what the Inception network was trained on, so that nothing is resized.
SIDE = 299
#: Of smaller images a patch is most of the picture.
SMALLEST = 512


def centre_patches(images: Tensor, side: int = SIDE) -> Tensor:
    """The middle of images (N, C, H, W) as (N, C, side, side), at their own resolution.

    Patch FID is the Fréchet distance (:func:`fewstep.eval.metrics.frechet.frechet_distance`) of the Inception features
    of such patches of both sets: Lin et al. 2024 (arXiv 2402.13929) and Yin et al. 2024 (arXiv
    2405.14867), one patch an image. Of an odd rest the middle is rounded to even, as torchvision's center_crop does it.

    Raises:
        ValueError: images of less than 512 pixels on a side. (The code of the second paper takes them whole.)
    """
    height, width = images.shape[-2:]
    if min(height, width) < max(SMALLEST, side):
        raise ValueError(f"patches need images of at least {SMALLEST} pixels on a side, not {height}x{width}")
    top, left = round((height - side) / 2), round((width - side) / 2)
    return images[..., top : top + side, left : left + side]
