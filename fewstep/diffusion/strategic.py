"""TCD's walk between a student's steps: back beyond the next time, and up to it by fresh noise.

Strategic stochastic sampling (Zheng et al. 2024, TCD, arXiv 2402.19159, Algorithm 4): a step from t to t' first jumps
along the trajectory to s = (1 - gamma) t', and is then noised from s up to t'. Gamma 0 is the ODE, gamma 1 noises the
end of the trajectory anew. diffusers' ``TCDScheduler`` calls gamma eta, reckons in whole timesteps, and ends at the
table's lowest entry, where the sample still holds a little noise; so does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import add_noise, ode_step, transition
from fewstep.diffusion.schedule import Coefficients, NoiseSchedule, TableSchedule


@dataclass(frozen=True)
class Move:
    """What happens between two steps.

    Attributes:
        renoise: ``"ode"``, ``"fresh"`` or ``"tcd"``, see :class:`fewstep.diffusion.rollout.Sampler`.
        gamma: of ``"tcd"``.
    """

    renoise: str
    gamma: float = 0.0


def walk_end(schedule: NoiseSchedule, renoise: str) -> float:
    """The time at which a walk's last step ends: 0, under ``renoise="tcd"`` a table's lowest entry."""
    return 1 / schedule.num_train_timesteps if renoise == "tcd" and isinstance(schedule, TableSchedule) else 0.0


def strategic_time(schedule: NoiseSchedule, then: Tensor, gamma: float) -> Tensor:
    """s = (1 - gamma) t' (B,), float64, below the next times ``then`` (B,); of a table the entry at or below it."""
    if not isinstance(schedule, TableSchedule):
        return (1 - gamma) * then.double()
    # In float32, as the stock scheduler has it: 0.7 of timestep 90 is 63 there, and 62 in float64.
    timestep = torch.floor((1 - gamma) * schedule.timestep(then).round().float())
    return schedule.time(timestep)


def strategic_step(
    schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, t: Tensor, then: Tensor, gamma: float, noise: Tensor
) -> Tensor:
    """The sample (B, ...) at ``then`` (B,), after ``x0`` (B, ...) was said at ``x_t`` (B, ...) and ``t`` (B,).

    x_s = alpha_s x0 + sigma_s eps, x' = (alpha' / alpha_s) x_s + sqrt(sigma'^2 - (alpha' sigma_s / alpha_s)^2) noise.
    """
    back = strategic_time(schedule, then, gamma)
    at_s, there = schedule.coefficients(back), schedule.coefficients(then)
    way = transition(at_s, there)
    # The root of a difference that is 0 but for rounding would be noise of 1e-8.
    way = Coefficients(way.alpha, torch.where(back < then, way.sigma, 0.0))
    return add_noise(ode_step(x_t, x0, schedule.coefficients(t), at_s), noise, way)
