"""MDT-dist: few-step students of 3-D flow models (2025, arXiv 2509.04406), in latents of any rank.

The student says the average velocity u(x_t, t) from t down to the clean sample, so that x0 = x_t - t u in one jump.
Differentiating t u = (integral of v) along the teacher's flow gives u = v - t du/dt: velocity matching asks it of
noised data, velocity distillation of the student's own one-step samples, the student itself in the fake's place.

    accelerate launch -m fewstep.trainers.mdt_dist --teacher DIR --prompts FILE --guidance_scale 41 --steps 2 --out OUT

A 3-D model is no diffusers pipeline: :func:`fewstep.programs.module.distill_module` runs this method on any
``torch.nn.Module`` called as ``network(x_t, t, **condition)``, for dense latents (B, C, D, H, W) as well as sparse
ones, objects of unequally many voxels, padded, with a mask of those that are there.

Departures: teachers of every kind learn in rectified flow's coordinates, x_t / (alpha + sigma). Both terms share noise,
time and condition, as in the code. A guidance is one number for each term, no list to draw from, so that no two
processes differ. Without ``--data`` noised samples of the teacher stand for data. The multi-phase baseline of the code
is :mod:`fewstep.trainers.segmented_consistency`. Clipping is by one norm, and there is no float16. Optional, and off:
the weight 1 - t of the exact gradient of distillation, which the code drops. Of a sparse batch, means are over the
voxels of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import Coefficients
from fewstep.diffusion.timesteps import logit_normal_times
from fewstep.errors import UserError
from fewstep.losses.mean_flow import mean_flow_target
from fewstep.losses.present import mean_over_present, of_present, present_entries
from fewstep.losses.trig_flow import normalized
from fewstep.networks.derivative import derivative_along
from fewstep.networks.flow_map import flow_direction
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.sending import known_too
from fewstep.trainers._mdt_dist_config import MdtDistConfig
from fewstep.training.method import Bench, Turn

#: The argument of a network that is the mask of sparse samples: (B, N) for samples (B, N, ...).
PRESENT = "present"
_ADVICE = "take --derivative backward"


class Said(NamedTuple):
    """The student's average velocity ``u`` at some points, and what it shall be, held fixed; both (B, ...)."""

    u: Tensor
    target: Tensor


class MdtDist:
    """The method; see the module. Roles: student, teacher, ema if asked for.

    Args:
        config: of the run.
        roles: by name.
        guided_teacher: of velocity matching.
        distilled_teacher: the same under the guidance of velocity distillation.
        sampler: the student's.
    """

    Config = MdtDistConfig

    def __init__(
        self,
        config: MdtDistConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        distilled_teacher: GuidedDenoiser,
        sampler: Sampler,
    ) -> None:
        self.config = config = config.resolved()
        self.roles, self.sampler, self.schedule = roles, sampler, sampler.schedule
        self.student = roles["student"].single.denoiser
        velocity = roles["teacher"].single.denoiser.velocity  # guidance mixes velocities as it does x0
        self.teacher, self.distilled = guided_teacher.of(velocity), distilled_teacher.of(velocity)
        self.span = config.span(self.schedule, sampler.grid[0])
        self.difference = config.difference(self.schedule, sampler.grid[0])
        # Blocks that are run again in the backward pass have no tangents there, and divided ones none with a graph.
        self.one_pass = config.sharding == "none" and not config.gradient_checkpointing

    @classmethod
    def prepare(cls, config: MdtDistConfig, bench: Bench) -> MdtDist:
        """Make the roles: the student starts as the teacher, or as in --init.

        Raises:
            UserError: several networks share the time.
        """
        config = config.resolved()
        exact = config.differentiates
        roles = bench.make_differentiated_roles(exact=True) if exact else bench.make_roles("student")
        if len(roles["teacher"].experts) > 1:
            raise UserError("several networks share this teacher's time; a velocity is averaged of one: take dmd2")
        bench.describe(trained_at_every_count=True)
        distilled = bench.guided(roles["teacher"], config.distillation_guidance)
        return cls(config, roles, bench.guided(roles["teacher"]), distilled, bench.sampler)

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student in every step, by both losses (Alg. 1)."""
        config = self.config
        samples = batch.real if config.data is not None else batch.pairs
        told, noise, t = samples.conditioning, batch.draws.normal("noise", batch.shape), self.drawn(batch)

        # 1. Velocity matching: at noised data the student says the teacher's velocity, averaged.
        said = self.said(samples.x0, noise, t, told, self.teacher)
        matching = self.loss(said.u, said.target, told).mean()
        pieces: list[tuple[Tensor, Tensor | None]] = [(config.matching_weight * matching, None)]
        log = {"student/matching": matching.detach()}

        # 2. Velocity distillation: the same at its own samples of one step moves these as far as they miss it.
        if config.distillation_weight:
            start = self.sampler.initial_scale * batch.draws.normal("sample_noise", batch.shape)
            u, x0 = self.one_step(start, told)
            with torch.no_grad():
                fake = self.said(x0, noise, t, told, self.distilled)
                error = fake.u - fake.target
            each = self.loss(u + (error - u.detach()), torch.zeros_like(u), told)
            if config.distillation_time_weight == "1-t":
                each = (1 - self.schedule.flow_time(t)).to(each) * each
            distillation = each.mean()
            pieces.append((config.distillation_weight * distillation, None))
            log["student/distillation"] = distillation.detach()
        yield Turn("student", pieces, log)

    def drawn(self, batch: Batch) -> Tensor:
        """Times (B,), float64: of flow times scaled to what the student learns."""
        low, high = self.span

        def placed(draw: Tensor) -> Tensor:
            uniform = self.config.times == "uniform"
            share = draw.double() if uniform else logit_normal_times(draw, self.config.time_mean, self.config.time_std)
            return self.schedule.snap(self.schedule.time_from_flow_time(low + (high - low) * share))

        draws = batch.draws
        return known_too(placed, draws.uniform("t") if self.config.times == "uniform" else draws.normal("t", ()))

    def one_step(self, start: Tensor, conditioning: AnyConditioning) -> tuple[Tensor, Tensor]:
        """The average velocity from the student's first x_t, with its graph, and where it leads, without: (B, ...)."""
        t = self.sampler.times(0, start)
        u = self.student.velocity(start, t, conditioning)
        alpha, sigma = self.schedule.coefficients(t)
        return u, expand(1 / (alpha + sigma), start) * start - expand(self.schedule.flow_time(t), u) * u.detach()

    def said(
        self, x0: Tensor, noise: Tensor, t: Tensor, conditioning: AnyConditioning, teacher: GuidedDenoiser
    ) -> Said:
        """What the student says of ``x0`` (B, ...) noised to ``t`` (B,), and v - t du/dt along the teacher's v."""
        alpha, sigma = self.schedule.coefficients(t)
        x_t = add_noise(x0, noise, Coefficients(alpha, sigma + self.config.sigma_min * alpha))
        with torch.no_grad():
            v = teacher(x_t, t, conditioning)
        u, change = self.followed(x_t, t, conditioning, v, noise - x0)
        present = present_of(conditioning)
        change = of_present(change, present)
        kind, constant = self.config.normalization, self.config.normalization_constant
        change = normalized(change, kind, constant, present_entries(change, present))
        return Said(u, mean_flow_target(v, change, self.schedule.flow_time(t)))

    def followed(
        self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, v: Tensor, line: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u (B, ...) with the caller's graph, and its derivative along the flow, or along ``line``, without."""
        student = self.student
        if self.difference is not None:
            u, clean = student.velocity(x_t, t, conditioning), torch.zeros_like(t)
            along = line if self.difference.kind == "renoise" else v
            at = x_t, t, conditioning, clean
            return u, self.difference(student.velocity, self.schedule, *at, along, u.detach())
        with torch.set_grad_enabled(self.one_pass and torch.is_grad_enabled()):
            u, change = derivative_along(
                partial(self._velocity, conditioning),
                (x_t, t),
                flow_direction(x_t, v, t, self.schedule),
                student.network,
                _ADVICE,
            )
        if torch.is_grad_enabled() and not self.one_pass:
            u = student.velocity(x_t, t, conditioning)
        return u, change

    def loss(self, u: Tensor, target: Tensor, conditioning: AnyConditioning) -> Tensor:
        """How far both (B, ...) are apart, (B,); its mean is that over all entries that are there."""
        return mean_over_present(self.config.distance, u, target, present_of(conditioning))

    def _velocity(self, conditioning: AnyConditioning, x_t: Tensor, t: Tensor) -> Tensor:
        return self.student.velocity(x_t, t, conditioning)


def present_of(conditioning: AnyConditioning) -> Tensor | None:
    """Which entries of sparse samples are there: the argument ``present`` of the network, where it has one."""
    if not isinstance(conditioning, Conditioning):
        return None
    present: Tensor | None = conditioning.arguments().get(PRESENT)
    return present


if __name__ == "__main__":
    main("mdt_dist")
