"""Guidance scales: one for all, one for each interval of the time, or one for each place in a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.intervals import TimedScale
from fewstep.errors import UserError
from fewstep.sending import sent


@dataclass(frozen=True)
class PlacedScale:
    """A guidance scale of its own for each place along one axis of a sample, as for each frame of a video.

    Attributes:
        scales: w at each place.
        axis: of samples (B, ...), batch axis included.
    """

    scales: tuple[float, ...]
    axis: int

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """The scales, shaped (1, ..., places, ..., 1) and typed to multiply ``like`` (B, ...), at any ``t``.

        Raises:
            ValueError: ``like`` has another number of places.
        """
        if like.shape[self.axis] != len(self.scales):
            raise ValueError(f"{len(self.scales)} guidance scales along axis {self.axis} of samples {list(like.shape)}")
        shape = [1] * like.dim()
        shape[self.axis] = len(self.scales)
        return sent(self.scales, like.device, torch.float64).to(like.dtype).reshape(shape)


#: A guidance scale in diffusers' convention, in which 1 is off.
GuidanceScale = float | TimedScale | PlacedScale


def plain_scale(scale: GuidanceScale, later: Sequence[float] = ()) -> float | list[float]:
    """A guidance scale as JSON holds it: one number, or one for each interval of the time or place in a sample.

    Of a teacher with more than two answers the ``later`` scales stand behind it.
    """
    if not later:
        return scale if isinstance(scale, int | float) else list(scale.scales)
    return [*([scale] if isinstance(scale, int | float) else scale.scales), *later]


def one_number(scale: GuidanceScale, what: str) -> float:
    """A scale that is one number.

    Raises:
        UserError: it changes with the time or the place, and ``what`` needs one number.
    """
    if isinstance(scale, int | float):
        return scale
    raise UserError(f"{what} needs a guidance of one number, and this teacher's is {plain_scale(scale)}")
