"""How an average velocity changes along a flow by two further calls of its network, for networks without a derivative.

Everything is in rectified flow's coordinates, y = x_t / (alpha + sigma) and tau = sigma / (alpha + sigma), in which a
velocity v moves y by h v while tau moves by h. No call has a graph, and attention is of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning, join
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError

#: How the derivative is taken: exactly, or by differences.
DERIVATIVES = ("exact", "central", "renoise", "backward")

#: The average velocity (B, ...) at x_t (B, ...) and t (B,), for B samples, down to ``end`` (B,).
AverageVelocity = Callable[[Tensor, Tensor, AnyConditioning, Tensor], Tensor]


@dataclass(frozen=True)
class FiniteDifference:
    """du/dtau along a direction, r held, as a difference.

    ==========  ==========================================================================================
    kind        du/dtau
    ==========  ==========================================================================================
    central     [u(y + h v, tau + h) - u(y - h v, tau - h)] / 2h, of the second order in h
    renoise     the same with h tau in the place of h: x0 and noise mixed anew at tau (1 - h) and
                tau (1 + h), where ``v`` is noise - x0
    backward    [u(y, tau) - u(y - h v, tau - h)] / h, of the first order, in one call
    ==========  ==========================================================================================

    No network is asked at noisier times than ``high``, at or below r, or at less than 0: there the difference is
    one-sided (as in FastGen), and 0 where there is room on neither side, that is over less than h.

    Attributes:
        kind: see above.
        step: h, in units of flow time.
        high: the noisiest flow time.
        guarded: False asks at all times, as mf-rae's code does.
    """

    kind: str
    step: float
    high: float = 1.0
    guarded: bool = True

    def __post_init__(self) -> None:
        if self.kind not in DERIVATIVES[1:] or not self.step > 0:
            raise ValueError(f"a difference is one of {', '.join(DERIVATIVES[1:])}, with a step above 0")

    @property
    def calls(self) -> int:
        """Of the network, for each sample, beside the one whose answer is at hand."""
        return 1 if self.kind == "backward" else 2

    @torch.no_grad()
    def __call__(
        self,
        velocity: AverageVelocity,
        schedule: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        end: Tensor,
        direction: Tensor,
        u: Tensor,
    ) -> Tensor:
        """du/dtau (B, ...).

        Args:
            velocity: the network's.
            schedule: of its times; those of a table are asked at its entries.
            x_t: (B, ...).
            t: (B,), float64.
            conditioning: of B samples.
            end: r (B,), at most t.
            direction: a velocity (B, ...).
            u: ``velocity`` at these points (B, ...).
        """
        tau = schedule.flow_time(t)
        alpha, sigma = schedule.coefficients(t)
        y = x_t / expand(alpha + sigma, x_t)
        above, below = (_placed(schedule, other, tau, t) for other in self.ends(tau, schedule.flow_time(end)))

        def moved(place: tuple[Tensor, Tensor]) -> Tensor:
            there, time = place
            alpha, sigma = schedule.coefficients(time)
            return (y + expand(there - tau, y) * direction) * expand(alpha + sigma, y)

        if self.kind == "backward":  # one of both ends is where u was asked
            other = tuple(torch.where(below[0] < tau, down, up) for up, down in zip(above, below, strict=True))
            place = other[0], other[1]
            return (velocity(moved(place), place[1], conditioning, end) - u) * _rate(place[0] - tau, u)
        asked = (torch.cat([moved(above), moved(below)]), torch.cat([above[1], below[1]]))
        further, nearer = velocity(*asked, join([conditioning, conditioning]), torch.cat([end, end])).chunk(2)
        return (further - nearer) * _rate(above[0] - below[0], u)

    def ends(self, tau: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """The flow times (B,) between which the difference is taken, for those of t and of r (B,)."""
        step = self.step * tau if self.kind == "renoise" else torch.full_like(tau, self.step)
        up, down = tau + step, tau - step
        if self.guarded:
            up = torch.where(up <= self.high, up, tau)
            down = torch.where((down >= 0) & (down > rho), down, tau)
        return (torch.where(down < tau, tau, up), down) if self.kind == "backward" else (up, down)


def finite_difference(kind: str, step: float, schedule: NoiseSchedule, high: float) -> FiniteDifference:
    """The difference of a run; under a table its step is at least from one entry to the next.

    Args:
        kind: of :class:`FiniteDifference`.
        step: of the same.
        schedule: of the network.
        high: the noisiest flow time.

    Raises:
        UserError: ``renoise`` under a table, whose entries its steps, a share of the time, do not meet.
    """
    entries = schedule.num_train_timesteps
    if entries is None:
        return FiniteDifference(kind, step, high)
    if kind == "renoise":
        raise UserError("--derivative renoise takes steps that no entries of this teacher's table are; take central")
    apart = schedule.flow_time(torch.arange(1, entries + 1, dtype=torch.float64) / entries).diff().max()
    return FiniteDifference(kind, max(step, float(apart)), high)


def _placed(schedule: NoiseSchedule, wanted: Tensor, tau: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Where a network can be asked nearest to a flow time: that flow time, and the schedule's own time, (B,) each."""
    time = torch.where(wanted == tau, t, schedule.snap(schedule.time_from_flow_time(wanted)))
    return torch.where(time == t, tau, schedule.flow_time(time)), time


def _rate(distance: Tensor, like: Tensor) -> Tensor:
    """1 / distance (B, 1, ...), and 0 where there is none."""
    away = distance != 0
    return expand(torch.where(away, 1 / torch.where(away, distance, 1.0), 0.0), like)
