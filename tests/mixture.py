"""A mixture of Gaussians in the plane whose score has a closed form: where a student of it has to end is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from toys import unconditional

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import PREVIEWS_STEP, Draws
from fewstep.diffusion.rollout import Sampler, draw_sample, ode_sampler, rollout
from fewstep.training.loop import sampling_role
from fewstep.training.spread import beside


class MixtureTeacher(nn.Module):
    """The exact x0 of a mixture of narrow Gaussians under flow matching, plus a correction that starts at zero."""

    MEANS = ((2.0, 0.0), (-1.0, 1.7), (-1.0, -1.7))
    STD = 0.3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(self.MEANS))
        self.correction = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.correction[-1].weight)
        nn.init.zeros_(self.correction[-1].bias)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).to(x.dtype).reshape(-1, 1)
        alpha, variance = 1 - t, (1 - t) ** 2 * self.STD**2 + t**2
        offset = x[:, None] - alpha[:, None] * self.means
        share = torch.softmax(-offset.square().sum(2) / (2 * variance), 1)
        each = self.means + self.STD**2 * (alpha / variance)[:, None] * offset
        return (share[:, :, None] * each).sum(1) + self.correction(torch.cat([x, t], 1))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, 0 where the distributions agree."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def mixture_sample(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(3, (count,), generator=generator)
    return torch.tensor(MixtureTeacher.MEANS)[which] + 0.3 * torch.randn(count, 2, generator=generator)


@torch.no_grad()
def distance_of_walk(student: Denoiser, sampler: Sampler) -> float:
    """How far 3,000 samples of a student's walk with new noise are from the mixture; two exact sets are 0.003 apart."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(3000, 2, generator=generator)
    samples = rollout(student, sampler, noise, unconditional(3000), lambda _: torch.randn(3000, 2, generator=generator))
    return energy_distance(samples, mixture_sample(3000, 1))


def spread_of(method: Any) -> Callable[[int, object], dict[str, float]]:
    """What a run's sample grids say for its log: 32 samples of the student beside the teacher's of the same noise."""

    @torch.no_grad()
    def sampled(_step: int, _pause: object) -> dict[str, float]:
        sampler, count = method.sampler, 32
        walks = ((sampling_role(method.roles), sampler), (method.roles["teacher"], ode_sampler(sampler.schedule, 25)))
        draws = (Draws(0, PREVIEWS_STEP, range(count)) for _ in walks)
        both = zip(walks, draws, strict=True)
        return beside(*(draw_sample(who, walk, noise, (2,), unconditional(count)) for (who, walk), noise in both))

    return sampled
