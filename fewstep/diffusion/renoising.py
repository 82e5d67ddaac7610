"""Noising a student's sample anew, at a time of its own, keyed by name: where teacher and critic look at it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise, transition
from fewstep.diffusion.schedule import Coefficients, NoiseSchedule
from fewstep.diffusion.timesteps import logit_normal_times, shift_time, uniform_times, unshift_time
from fewstep.errors import UserError
from fewstep.sending import known_too


class Renoised(NamedTuple):
    """A noised sample (B, ...), its time (B,) and the unit noise (B, ...) that was added last."""

    x_t: Tensor
    t: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Renoiser:
    """Draws a time and noises a sample up to it.

    Attributes:
        schedule: of the networks that will look at it.
        low: lowest time before the shift.
        high: highest time before the shift.
        shift: of the times, as in :func:`fewstep.diffusion.timesteps.shift_time`.
        anchor: the time at which the given samples are, below every time drawn; None for clean ones.
        normal: mean and standard deviation of the normal of which a time is the sigmoid before the shift (AnyFlow's
            critic); None for uniform times.
    """

    schedule: NoiseSchedule
    low: float
    high: float
    shift: float = 1.0
    anchor: float | None = None
    normal: tuple[float, float] | None = None

    def below(self, t: float) -> Renoiser:
        """The same one, drawing no time that is noisier than ``t``."""
        highest = min(self.high, self._unshifted(t))
        return replace(self, low=min(self.low, highest), high=highest)

    def not_below(self, t: float | None) -> Renoiser:
        """The same one, drawing no time that is cleaner than ``t``; None for no such bound.

        Raises:
            UserError: no times are left.
        """
        if t is None:
            return self
        low = max(self.low, self._unshifted(t))
        if low >= self.high:
            raise UserError(f"no time between t = {t:.4g} and --time_max is left to compare at; give a lower one")
        return replace(self, low=low)

    def above(self, anchor: float | None, margin: float) -> Renoiser:
        """The same one for samples at ``anchor``, drawing times at least ``margin`` noisier before the shift.

        Raises:
            UserError: no times are left.
        """
        if anchor is None:
            return self
        low = max(self.low, self._unshifted(anchor) + margin)
        if low >= self.high:
            raise UserError(
                f"a phase that ends at t = {anchor:.4g} leaves no noisier times to compare at, below --time_max; give "
                "the noisiest phase more steps, or a smaller --time_margin"
            )
        return replace(self, low=low, anchor=anchor)

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest time that is drawn."""
        low, high = shift_time(torch.tensor([self.low, self.high], dtype=torch.float64), self.shift).tolist()
        return low, high

    def times(self, draws: Draws, name: str) -> Tensor:
        """The times (B,), float64, from the draw ``<name>_time``."""
        draw = draws.uniform(f"{name}_time") if self.normal is None else draws.normal(f"{name}_time", ())
        return known_too(self._placed, draw)

    def _placed(self, draw: Tensor) -> Tensor:
        if self.normal is None:
            t = uniform_times(draw, self.low, self.high)
        else:
            t = logit_normal_times(draw, *self.normal).clamp(self.low, self.high)
        t = self.schedule.snap(shift_time(t, self.shift))
        # A sample that is noised to where it is already gets no noise, and has no target.
        return t if self.anchor is None else t.clamp(min=self.schedule.after(self.anchor))

    def __call__(self, x: Tensor, draws: Draws, name: str) -> Renoised:
        """``x`` (B, ...) at a noisier time, from the draws ``<name>_time`` and ``<name>_noise``."""
        t, noise = self.times(draws, name), draws.normal(f"{name}_noise", x.shape[1:])
        return Renoised(add_noise(x, noise, transition(self.origin(t), self.schedule.coefficients(t))), t, noise)

    def origin(self, t: Tensor) -> Coefficients:
        """The coefficients of the given samples, as many as ``t`` (B,)."""
        if self.anchor is None:
            return Coefficients(torch.ones_like(t), torch.zeros_like(t))
        return self.schedule.coefficients(torch.full_like(t, self.anchor))

    def _unshifted(self, t: float) -> float:
        return float(unshift_time(torch.tensor(t, dtype=torch.float64), self.shift))
