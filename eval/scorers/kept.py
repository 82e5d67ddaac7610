"""Whether a filled picture keeps what was given of it: pixels outside of the hole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.data.item_pictures import is_mask
from fewstep.eval.scorers.scorer import Asked

_WHITE = 127  # pipelines make masks of two values: what is brighter is repainted


class KeptScorer:
    """1 - mean |sample - picture| over the pixels that were given, in [0, 1].

    To be read beside the teacher's: what goes through an autoencoder is never kept whole.
    """

    name = "1 - mean absolute difference of the given pixels"
    names: tuple[str, ...] = ("kept",)
    sha256: str | None = None
    verified = True
    looks_at: Literal["images", "videos"] = "images"

    def __call__(self, images: Tensor, asked: Asked = None) -> Mapping[str, Tensor]:
        """uint8 (N, 1 or 3, H, W) and their items -> kept, float64 (N,).

        Raises:
            ValueError: a sample was not asked for by a picture with a hole.
        """
        size = (images.shape[-1], images.shape[-2])
        found = [picture_and_hole(one, size) if isinstance(one, Item) else None for one in asked or ()]
        pairs = [one for one in found if one is not None]
        if len(pairs) < len(images):
            raise ValueError("not every sample was asked for by a picture and the mask of its hole")
        pictures, holes = (torch.stack(some) for some in zip(*pairs, strict=True))
        return {"kept": kept(images, pictures, holes)}

    def note(self) -> str | None:
        return None


def picture_and_hole(item: Item, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor] | None:
    """The grey picture of an item, uint8 (1, H, W), and bool (1, H, W), True where it is repainted.

    Args:
        item: None is answered where it has not one picture and one mask, which diffusers calls by that word.
        size: width and height that they are brought to, as pipelines do; None takes the picture's.
    """
    pictures = item.pictures
    masks = [value for name, value in pictures.items() if is_mask(name)]
    shown = [value for name, value in pictures.items() if not is_mask(name)]
    both = [*shown, *masks]
    if len(masks) != 1 or len(shown) != 1 or not all(isinstance(value, Image.Image) for value in both):
        return None
    wanted = size or shown[0].size
    grey, mask = (
        value.convert("L") if value.size == wanted else value.convert("L").resize(wanted, way)
        for value, way in zip(both, (Image.Resampling.LANCZOS, Image.Resampling.NEAREST), strict=True)
    )
    return torch.from_numpy(np.array(grey))[None], torch.from_numpy(np.array(mask))[None] > _WHITE


def kept(images: Tensor, pictures: Tensor, holes: Tensor) -> Tensor:
    """1 - mean |sample - picture| over the given pixels of each, in [0, 1]: 1 keeps all of them.

    Args:
        images: the samples, uint8 (N, 1 or 3, H, W); of colour the mean over the channels is compared.
        pictures: what was given, likewise.
        holes: bool (N, 1, H, W), True where nothing was given.

    Returns:
        float64 (N,); 1 where a picture is all hole.
    """
    sample, picture = (some.double().mean(1, keepdim=True) / 255 for some in (images, pictures))
    off = torch.where(holes, 0.0, (sample - picture).abs())
    return 1 - off.flatten(1).sum(1) / (~holes).flatten(1).sum(1).clamp(min=1)
