"""Consistency models (LCM, CD, iCT, ECT): f(x_t, t), the end of a trajectory, is the same at all of its times.

The student at a time t is drawn to a slow copy of itself, or to itself without gradient, at a neighbouring time r < t
of the same trajectory. ``--variant`` says how the neighbour is found and how the two are compared:

- ``lcm``: latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), one ODE step of the guided teacher on a
  coarse grid; LCM-LoRA (arXiv 2311.05556) with ``--lora_rank``; tables and flow alike
- ``cd``, ``ct``: consistency distillation by a Heun step, and training (Song et al. 2023, arXiv 2303.01469)
- ``ict``: improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189)
- ``ect``: easy consistency tuning (Geng et al. 2024, arXiv 2406.14548)

    accelerate launch -m fewstep.trainers.consistency --teacher DIR --prompts FILE --data DIR --steps 8 --out OUT

Departures: f is what the shipped stock scheduler computes, so EDM students have EDM's own scalings and a hard boundary
instead of CM's shifted ones, and flow students x0 itself. The times at which the student is sampled are added to the
even grids. Distillation without ``--data`` trains on the student's own samples. Noise levels of flow and table teachers
are read as EDM's. No LPIPS, no dropout, and AdamW in the place of RAdam. LCM-LoRA adapts attention layers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.checks import settled
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.discretization import Discretization, SigmaRange, TimePair
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.timesteps import uniform_times
from fewstep.losses.consistency import Boundary, distance, weight
from fewstep.losses.huber import huber_constant
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import GuidanceEmbedding
from fewstep.networks.roles import Role
from fewstep.trainers._consistency_config import ConsistencyConfig
from fewstep.training.method import Bench, Turn
from fewstep.training.own_samples import own_sample


@dataclass(frozen=True)
class Comparison:
    """One trajectory at two times, all (B, ...): the student's f at t, the target's at r, and the sample x_r there."""

    f: Tensor
    target: Tensor
    x_r: Tensor


class Consistency:
    """The method; see the module. Roles: student, teacher, target (where it is a copy of its own), ema if asked for."""

    Config = ConsistencyConfig

    def __init__(
        self,
        config: ConsistencyConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        discretization: Discretization,
        boundary: Boundary,
        told: GuidanceEmbedding | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.discretization, self.boundary = discretization, boundary
        self.solver, self.weighting = settled(config.solver), settled(config.weighting)
        self.told, self.heeded = told, told is not None and told.heeded
        self.student, self.teacher = roles["student"], guided_teacher
        self.target = roles.get("target", self.student)
        self.sigma_data = getattr(self.schedule, "sigma_data", 0.5)

    @classmethod
    def prepare(cls, config: ConsistencyConfig, bench: Bench) -> Consistency:
        """Make the roles: the student starts as the teacher, or as in --init, and the target as the student."""
        config = config.resolved()
        roles = bench.make_roles("student", *(["target"] if config.target_decay != 0 else []))
        teacher, told = bench.guided(roles["teacher"]), bench.guidance_embedding
        prediction = bench.recording.prediction_type
        config.refuse_teacher(prediction, teacher.further > 0, told.default if told else None)
        levels = SigmaRange(bench.sampler.schedule, bench.sampler.grid[0])
        visited = sorted({t for grid in bench.grids.values() for t in grid})
        discretization = config.make_discretization(levels, bench.shift, visited)
        boundary = config.make_boundary(levels, bench.scheduler.config.get("timestep_scaling"))
        bench.describe(trained_at_every_count=True, guidance_range=config.embedded_guidance)
        return cls(config, roles, teacher, bench.sampler, discretization, boundary, told)

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def target_decay(self, step: int) -> float:
        """How slowly the target follows the student."""
        return self.config.target_decay_at(step)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step."""
        # 1. A clean sample and what it shows, and the guidance under which the teacher sees it (LCM, Alg. 1).
        guidance_scale = self.guidance_scale(batch)
        x0, conditioning = self.samples(batch, guidance_scale)

        # 2. Two neighbouring times of one trajectory (CM, Alg. 2 and 3; iCT, Eq. 10; ECT, §3.2).
        pair = self.discretization.draw(step, batch.draws)
        noise = batch.draws.normal("noise", batch.shape)

        # 3. At both f shall say the same.
        seen = self.compare(x0, noise, pair, conditioning, None if self.heeded else guidance_scale)
        apart = self.distance(seen)
        weights = weight(self.weighting, pair.sigma_t, pair.sigma_r, self.sigma_data)
        loss = (weights.to(apart.dtype) * apart).mean()
        log = {"student/consistency": loss.detach(), "student/distance": apart.detach().mean()}
        log |= {"student/interval": (pair.t - pair.r).mean()}
        log |= {"student/f_std": seen.f.detach().std(), "student/target_std": seen.target.std()}
        yield Turn("student", [(loss, None)], log)

    def compare(
        self,
        x0: Tensor,
        noise: Tensor,
        pair: TimePair,
        conditioning: AnyConditioning,
        guidance_scale: Tensor | None = None,
    ) -> Comparison:
        """The trajectory of ``x0`` and ``noise`` (B, ...) at both times; the gradient goes into f alone.

        ``guidance_scale`` (B,) is the teacher's, where each sample has its own and the network is not told it.
        """
        t, r = pair.t, pair.r
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        with torch.no_grad():
            x_r = self.neighbour(x0, noise, x_t, pair, conditioning, guidance_scale)
            # A trajectory's end is where it ends; the network, which knows no such time, is asked in vain at t.
            ended = pair.sigma_r == 0
            target = self.function(self.target)(x_r, torch.where(ended, t, r), conditioning)
            target = torch.where(expand(ended, x0).bool(), x_r, target)
        return Comparison(self.function(self.student)(x_t, t, conditioning), target, x_r)

    def neighbour(
        self,
        x0: Tensor,
        noise: Tensor,
        x_t: Tensor,
        pair: TimePair,
        conditioning: AnyConditioning,
        guidance_scale: Tensor | None,
    ) -> Tensor:
        """x_r (B, ...): by the same noise (training), or one step of the guided teacher's ODE (distillation)."""
        t, r = pair.t, pair.r
        if self.solver == "none":
            return add_noise(x0, noise, self.schedule.coefficients(r))
        return self.teacher.step(self.schedule, x_t, t, r, conditioning, self.solver, guidance_scale=guidance_scale)

    def function(self, role: Denoiser) -> Denoiser:
        """f of a role: skip * x_t + out * x0, exactly what the scheduler that ships makes of the network's answer."""

        def f(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
            skip, out = self.boundary(t)
            return expand(skip, x_t) * x_t + expand(out, x_t) * role(x_t, t, conditioning)

        return f

    def distance(self, seen: Comparison) -> Tensor:
        """How far f and target are apart, for each sample (B,)."""
        c = self.config.huber_c
        c = huber_constant(seen.f[0].numel()) if c is None else c
        return distance(settled(self.config.distance), seen.f, seen.target, c)

    def guidance_scale(self, batch: Batch) -> Tensor | None:
        """Of each sample (B,), where it is drawn."""
        drawn = self.config.guidance_range
        return None if drawn is None else uniform_times(batch.draws.uniform("guidance_scale"), *drawn)

    def samples(self, batch: Batch, guidance_scale: Tensor | None) -> tuple[Tensor, AnyConditioning]:
        """Clean samples (B, ...) with their conditioning: real ones, else the student's own, ended at a random step."""
        real = None if self.config.data is None else batch.real
        conditioning = batch.conditioning if real is None else real.conditioning
        if self.told is not None and guidance_scale is not None:
            conditioning = self.told.tell(conditioning, guidance_scale)
        if real is not None:
            return real.x0, conditioning
        return own_sample(self.function(self.student), self.sampler, batch, conditioning), conditioning


if __name__ == "__main__":
    main("consistency")
