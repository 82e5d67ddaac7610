"""What a teacher's ODE passes through on its way, and the average velocity between any two of its states.

These are what a network of two times is to say there: fixed targets, where its own answers would be moving ones
(consistency mid-training, CMT; the pairs are those of MF-RAE, arXiv 2511.13019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.sending import sent

#: What times the states are told to be at: those at which the solver has them, or an even grid (the released code of
#: mf-rae, also where its solver's grid is shifted, and then its labels do not meet its states).
LABEL_TIMES = ("solver_times", "uniform_grid")


class Chord(NamedTuple):
    """Two states of a walk: ``x_t`` (B, ...) at ``t`` (B,), ``r`` < t (B,), and the average ``velocity`` (B, ...)."""

    x_t: Tensor
    t: Tensor
    r: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Trajectories:
    """N walks of S steps by the same times.

    Attributes:
        schedule: of the walks.
        states: (S + 1, N, ...), from the clean sample to noise.
        times: (S + 1,), float64, the schedule's own, of which the first is 0.
        labels: of :data:`LABEL_TIMES`.
    """

    schedule: NoiseSchedule
    states: Tensor
    times: Tensor
    labels: str = "solver_times"

    @property
    def pairs(self) -> int:
        """In how many ways two states can be chosen: S (S + 1) / 2."""
        return len(self.times) * (len(self.times) - 1) // 2

    def chords(self, pair: Tensor, walk: Tensor) -> Chord:
        """Between the two states of each ``pair`` (B,) of each ``walk`` (B,), integers.

        Pairs are counted with the noisier state outside: (1, 0), (2, 0), (2, 1), (3, 0), ...
        """
        ends = torch.tril_indices(len(self.times), len(self.times), -1, device=pair.device)
        i, j = ends[:, pair]
        told, place = self._told()
        alpha, sigma = self.schedule.coefficients(self.times)
        size = torch.cat([torch.ones_like(alpha[:1]), (alpha + sigma)[1:]])  # the first state is a clean sample
        x_t, x_r = self.states[i, walk], self.states[j, walk]
        apart = x_t / expand(size[i], x_t) - x_r / expand(size[j], x_r)
        return Chord(x_t, told[i], told[j], apart / expand(place[i] - place[j], x_t))

    def _told(self) -> tuple[Tensor, Tensor]:
        """The times (S + 1,) that a network is told, and their flow times."""
        place = self.schedule.flow_time(self.times)
        place = torch.cat([torch.zeros_like(place[:1]), place[1:]])
        if self.labels == "solver_times":
            return self.times, place
        noisiest = self.schedule.flow_time(torch.ones_like(place[:1]))
        place = torch.linspace(0, 1, len(place), dtype=place.dtype, device=place.device) * noisiest
        times = self.schedule.time_from_flow_time(place[1:])
        return torch.cat([torch.zeros_like(times[:1]), times]), place


@torch.no_grad()
def trajectories(
    solver: OdeSolver, x: Tensor, times: Sequence[float], conditioning: AnyConditioning, labels: str = "solver_times"
) -> Trajectories:
    """The walks of a solver from ``x`` (N, ...) at ``times[0]`` to the clean sample.

    Args:
        solver: of a teacher's ODE.
        x: where the walks begin.
        times: descending, without a final 0.
        conditioning: of N samples.
        labels: of :data:`LABEL_TIMES`.

    Raises:
        ValueError: other ``labels``.
    """
    if labels not in LABEL_TIMES:
        raise ValueError(f"labels is one of {', '.join(LABEL_TIMES)}, not {labels!r}")
    passed: list[Tensor] = []
    passed.append(solver.to_data(x, times, conditioning, lambda _t, x_t: passed.insert(0, x_t)))
    states = torch.stack([passed[-1], *passed[:-1]])
    ascending = sent([0.0, *reversed(times)], x.device, torch.float64)
    return Trajectories(solver.schedule, states, ascending, labels)
