"""What a scorer is, and what scorers share: frames of videos, prompts in pairs with images, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.conditioning.item import Item

#: What samples were asked for, one each; None where that is not known.
Asked = Sequence[str] | Sequence[Item] | None


class Scorer(Protocol):
    """Numbers for each sample, that need no other samples.

    name: of the scorer, with its network and what its numbers mean, as reports show it. names: of its numbers. sha256:
    of its weights; None where it has none. verified: whether these are the published ones. looks_at: "videos" where
    it means nothing of an image.
    """

    name: str
    names: tuple[str, ...]
    sha256: str | None
    verified: bool
    looks_at: Literal["images", "videos"]

    def __call__(self, images: Tensor, asked: Asked, /) -> Mapping[str, Tensor]:
        """uint8 images (N, C, H, W), or videos (N, F, C, H, W), C 1 or 3 -> float64 (N,) by name, on the CPU.

        asked: a prompt or an item for each sample; None where they are not known. Raises ValueError where it cannot be
        computed.
        """
        ...

    def note(self) -> str | None:
        """What a reader of the numbers scored so far has to know, in a sentence; None where there is nothing."""
        ...


def frames_of(images: Tensor) -> tuple[Tensor, int]:
    """All pictures of a batch one after the other, uint8 (N F, C, H, W), and F, which is 1 for images.

    Args:
        images: uint8 (N, C, H, W) or (N, F, C, H, W), C 1 or 3.

    Raises:
        ValueError: they have another shape or type.
    """
    if images.ndim == 5 and images.shape[1] > 0:
        pictures, frames = images.flatten(0, 1), images.shape[1]
    else:
        pictures, frames = images, 1
    if pictures.ndim != 4 or pictures.dtype != torch.uint8 or pictures.shape[1] not in (1, 3):
        raise ValueError(f"expected uint8 (N, [F,] 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    return pictures, frames


def each_sample(images: Tensor, score: Callable[[Tensor, Tensor], Tensor], batch_size: int) -> Tensor:
    """The score of each sample; that of a video is the mean over its frames.

    Args:
        images: uint8 (N, C, H, W) or (N, F, C, H, W).
        score: of at most ``batch_size`` pictures, uint8 (n, C, H, W), and the samples that they are of, int64 (n,) ->
            (n,).

    Returns:
        float64 (N,), on the CPU.

    Raises:
        ValueError: the images have another shape or type.
    """
    pictures, frames = frames_of(images)
    samples = torch.arange(len(images)).repeat_interleave(frames)
    batches = zip(pictures.split(batch_size), samples.split(batch_size), strict=True)
    parts = [score(*batch).double().cpu() for batch in batches if len(batch[1])]
    scores = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    return scores.view(-1, frames).mean(dim=1)


def paired(images: Tensor, asked: Asked, name: str) -> list[str]:
    """The prompts of the samples, one each.

    Raises:
        ValueError: there are none, or another number of them.
    """
    if asked is None:
        raise ValueError(f"{name} needs the samples' prompts")
    if len(asked) != len(images):
        raise ValueError(f"{name} got {len(images)} samples and {len(asked)} prompts")
    return [one if isinstance(one, str) else one.subject or "" for one in asked]
