"""Segmented consistency (TCD, PCM, TSCD): jumps along a part of the trajectory, all of which to one end agree.

A jump goes from x_t along the network's straight line to an end e < t. The student's jump from x_t is drawn to that of
its slow copy, or of itself without gradient, from the neighbour x_r that one step of the guided teacher's ODE reaches.
Time is cut into segments that no jump leaves. ``--variant`` says how, and where jumps end:

- ``tcd``: one segment, a random end (Zheng et al. 2024, Trajectory Consistency Distillation, arXiv 2402.19159): one
  student for 1 to 8 steps, sampled with as much new noise between them as one likes (``--gamma``)
- ``pcm``: as many segments (phases) as steps, ends at their edges (Wang et al. 2024, Phased Consistency Models, arXiv
  2405.18407), with a discriminator of the jumps if wanted (``--adversarial_weight [0.1]``)
- ``tscd``: 8, 4, 2 and 1 segments one after the other, random ends (Ren et al. 2024, Hyper-SD, arXiv 2404.13686)

    accelerate launch -m fewstep.trainers.segmented_consistency --teacher DIR --prompts FILE --data DIR --out OUT

Departures: ends are any entries of a table, and any times of a flow; a grid is divided by its segments; the times at
which the student is sampled belong to it. At r = e the target is x_r itself. The discriminator has one head on one map,
and TSCD's is not shown the jump's start; Hyper-SD's further stages are :mod:`fewstep.trainers.hyper_sd`. Without
``--data`` the student learns on its own samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.checks import settled
from fewstep.critic.jumps import JumpDiscriminator
from fewstep.data.batch import Batch
from fewstep.diffusion.discretization import SigmaRange, TimePair
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise, expand, ode_step
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.segments import Stage
from fewstep.diffusion.timesteps import uniform_times
from fewstep.errors import UserError
from fewstep.losses.consistency import distance
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.roles import Role
from fewstep.trainers._segmented_consistency_config import SegmentedConsistencyConfig
from fewstep.training.method import Bench, Turn
from fewstep.training.own_samples import own_sample


@dataclass(frozen=True)
class Jumps:
    """Where two jumps of one trajectory arrive, (B, ...): the student's from t, the target's from r; x_r is there."""

    student: Tensor
    target: Tensor
    x_r: Tensor


class SegmentedConsistency:
    """The method; see the module. Roles: student, teacher, target (a slow copy), discriminator, ema, as asked for."""

    Config = SegmentedConsistencyConfig

    def __init__(
        self,
        config: SegmentedConsistencyConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        stages: Sequence[Stage],
        judge: JumpDiscriminator | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.stages, self.judge = stages, judge
        self.student, self.teacher = roles["student"], guided_teacher
        self.target = roles.get("target", self.student)
        self.distance_weights = config.of_stages(settled(config.distance_weight))
        self.adversarial_weights = config.of_stages(settled(config.adversarial_weight))

    @classmethod
    def prepare(cls, config: SegmentedConsistencyConfig, bench: Bench, *others: str) -> SegmentedConsistency:
        """Make the roles: the student starts as the teacher, or as in --init, and the target as the student.

        Hyper-SD has ``others`` besides, which start as the student.
        """
        config = config.resolved()
        roles = bench.make_roles("student", *(["target"] if config.target_decay != 0 else []), *others)
        teacher = bench.guided(roles["teacher"])
        config.refuse_unguided(teacher.further > 0)
        judge = None
        if config.judged:
            if len(roles["teacher"].experts) > 1:
                raise UserError("--adversarial_weight needs a teacher of one network, and this has several; give [0]")
            roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
            loss = settled(config.adversarial_loss)
            judge = JumpDiscriminator(heads, bench.add_head(heads), bench.sampler.schedule, loss)
        last = settled(config.segments)[-1]
        # Of several segments no other count stops at their edges; of ends at edges alone no other is trained.
        grids = {count: grid for count, grid in bench.grids.items() if count % last == 0}
        visited = sorted({t for grid in grids.values() for t in grid})
        stages = config.make_stages(SigmaRange(bench.sampler.schedule, bench.sampler.grid[0]), bench.shift, visited)
        bench.describe(trained_at_every_count=True, counts=tuple(grids), grids=grids)
        return cls(config, roles, teacher, bench.sampler, stages, judge)

    def learning_rate(self, role: str) -> float:
        """Of the student or the discriminator."""
        return self.config.adversarial_lr if role == "discriminator" else self.config.lr

    def target_decay(self, step: int) -> float:
        """How slowly the target follows the student."""
        return settled(self.config.target_decay)

    def judged(self, step: int) -> bool:
        """Whether the jumps of a step have an adversarial term."""
        return self.adversarial_weights[self.config.stage_of(step)] > 0

    def moves(self, step: int) -> tuple[bool, bool]:
        """Whether a step updates the student, and whether the discriminator."""
        judged, alternate = self.judged(step), self.config.alternate
        return not (judged and alternate) or step % 2 == 1, judged and not (alternate and step % 2 == 1)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """The student's update and the discriminator's, both in a step or in turns."""
        # 1. A clean sample and what it shows, and the guidance under which the teacher sees it.
        drawn = self.config.guidance_range
        guidance_scale = None if drawn is None else uniform_times(batch.draws.uniform("guidance_scale"), *drawn)
        x0, conditioning = self.samples(batch)

        # 2. Two neighbouring times of the stage's grid, and where in their segment both jumps end.
        number = self.config.stage_of(step)
        stage = self.stages[number]
        pair = stage.grid.draw(step, batch.draws)
        end = stage.end(self.schedule, pair, batch.draws)
        noise = self.noise(batch.draws, batch.shape)

        # 3. The student: its jump shall arrive where the target's does, and not be told from it.
        student_moves, judge_moves = self.moves(step)
        with torch.set_grad_enabled(student_moves):
            seen = self.jumps(x0, noise, pair, end, conditioning, guidance_scale)
        judged = None
        if self.judge is not None and self.judged(step):
            judged = self.judge.noised(end, stage.span(end), batch.draws, batch.shape)
        if student_moves:
            apart = self.distance(seen)
            loss = self.distance_weights[number] * apart.mean()
            log = {"student/distance": apart.detach().mean(), "student/interval": (pair.t - pair.r).mean()}
            log |= {"student/jump": (pair.t - end).mean()}
            log |= {"student/arrived_std": seen.student.detach().std(), "student/target_std": seen.target.std()}
            if self.judge is not None and judged is not None:
                adversarial = self.judge.student_loss(seen.student, judged, conditioning)
                loss = loss + self.adversarial_weights[number] * adversarial
                log["student/adversarial"] = adversarial.detach()
            yield Turn("student", [(loss, None)], log | {"student/consistency": loss.detach()})

        # 4. The discriminator: tell where the target's jumps arrive from where the student's did.
        if self.judge is not None and judged is not None and judge_moves:
            loss = self.judge.own_loss(seen.student.detach(), seen.target, judged, conditioning)
            yield Turn("discriminator", [(loss, None)], {"discriminator/adversarial": loss.detach()})

    def jumps(
        self,
        x0: Tensor,
        noise: Tensor,
        pair: TimePair,
        end: Tensor,
        conditioning: AnyConditioning,
        guidance_scale: Tensor | None = None,
    ) -> Jumps:
        """Both jumps to ``end`` (B,) of the trajectory of ``x0`` and ``noise`` (B, ...); the gradient is the student's.

        ``guidance_scale`` (B,) is the teacher's, where each sample has its own.
        """
        t, r = pair.t, pair.r
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        with torch.no_grad():
            solver = self.config.solver
            x_r = self.teacher.step(self.schedule, x_t, t, r, conditioning, solver, guidance_scale=guidance_scale)
            # A jump of no length ends where it begins; the network, which may know no such time, is asked in vain at t.
            arrived = r <= end + 1e-9
            target = self.jump(self.target, x_r, torch.where(arrived, t, r), end, conditioning)
            target = torch.where(expand(arrived, x0).bool(), x_r, target)
        return Jumps(self.jump(self.student, x_t, t, end, conditioning), target, x_r)

    def jump(self, role: Role, x: Tensor, t: Tensor, end: Tensor, conditioning: AnyConditioning) -> Tensor:
        """J(x, t -> e) = alpha_e x0 + sigma_e eps (B, ...), where the role says x0, and so eps, at ``x`` and ``t``."""
        at_t, at_end = self.schedule.coefficients(t), self.schedule.coefficients(end)
        return ode_step(x, role(x, t, conditioning), at_t, at_end)

    def distance(self, seen: Jumps) -> Tensor:
        """How far apart both jumps arrive, for each sample (B,)."""
        return distance(settled(self.config.distance), seen.student, seen.target, self.config.huber_c)

    def noise(self, draws: Draws, shape: tuple[int, ...]) -> Tensor:
        """Unit noise (B, ...), and with offset noise a number more for each sample and channel."""
        noise, strength = draws.normal("noise", shape), settled(self.config.offset_noise)
        if strength == 0:
            return noise
        # Channels come first in maps and volumes, last in packed tokens.
        common = (1,) * (len(shape) - 1) + shape[-1:] if len(shape) < 3 else shape[:1] + (1,) * (len(shape) - 1)
        return noise + strength * draws.normal("offset_noise", common)

    def samples(self, batch: Batch) -> tuple[Tensor, AnyConditioning]:
        """Clean samples (B, ...) with their conditioning: real ones, else the student's own, ended at a random step."""
        if self.config.data is not None:
            return batch.real.x0, batch.real.conditioning
        return own_sample(self.student, self.sampler, batch, batch.conditioning), batch.conditioning


if __name__ == "__main__":
    main("segmented_consistency")
