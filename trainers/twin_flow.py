"""TwinFlow: one network that is its own adversary (arXiv 2512.05150; its released code).

At positive times the student says the average velocity of the data's flow between two times; at negative ones the
velocity of the flow that ends at its own one-step samples, the twin. Where the two differ, one-step samples are moved
by the difference, which is distribution matching without a critic: there is one network, and the teacher where it is
asked.

    accelerate launch -m fewstep.trainers.twin_flow --teacher DIR --prompts FILE --data DIR --steps 2 --out OUT

A batch has equal parts (``--parts``) that one pass answers: the whole path, short steps, any step, and the twin.
Targets are recursive (RCGM): one short step along the velocity, then ``--order`` calls of the student. Without
``--data`` the guided teacher's velocity is followed at samples of its own, or at the student's with ``--image_free``,
which needs no samples at all. Teachers of every kind, full and LoRA: times and velocities are rectified flow's
(:mod:`fewstep.networks.twin`).

Departures: the second time and the sign enter by an added module, zero at first (with LoRA, too), so that the student
starts as the teacher on both sides; the released code asks the teacher's embedder for a negative time, and its LoRA
form one for (t + r) / 2. Parts are by place in the whole step, so that one sample a
micro-batch will do, and take turns where a step has fewer samples. Guidance,
targets and samples are asked only for the rows that use them. The twin's noise is drawn afresh. Tables are asked at
their own times alone, with the first step as long as these are apart. A student that guides itself loses the
condition of some samples. Students walk by the paper's sampler ``any``, ``few`` or ``mul`` (``--sampler``); the times
of ``any``, and of tables and EDM ramps, are those of other students, and ``few`` starts at pure noise, not at .999. Its
second-order steps and its extrapolation are not offered.
``--order 0`` is the released code's: velocities of mul and adv, and rectification.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning, join, without_condition
from fewstep.config.checks import settled
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import one_number
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.diffusion.signed_times import BASE_PARTS, SignedTimes
from fewstep.errors import UserError
from fewstep.losses.twin_flow import distance, gap_weight, recursive_target
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.networks.twin import TwinDenoiser
from fewstep.sending import sent
from fewstep.trainers._twin_flow_config import PLAIN_PARTS, TwinFlowConfig
from fewstep.training.method import Bench, Turn

#: Where a walk of each sampler says that its steps end.
_TOLD = {"any": "next", "few": "clean", "mul": "same"}


@dataclass(frozen=True)
class Points:
    """Points of both flows, in rectified flow's coordinates.

    Attributes:
        y: (B, ...).
        t: (B,), float64, in (0, 1]; r: (B,), in [0, t]; neither has its sign.
        r: see t.
        times: the same as the host knows them, and each sample's part of the batch.
        line: noise - sample (B, ...), along which the samples were noised.
        conditioning: of B samples.
        kept: of B samples, whether the condition was kept.
    """

    y: Tensor
    t: Tensor
    r: Tensor
    times: SignedTimes
    line: Tensor
    conditioning: AnyConditioning
    kept: list[bool]

    @property
    def base(self) -> list[int]:
        """The rows that are not the twin's."""
        return [row for row, part in enumerate(self.times.part) if part != "adv"]


class TwinFlow:
    """The method; see the module. Roles: student of two times, teacher, ema and target if asked for."""

    Config = TwinFlowConfig

    def __init__(
        self, config: TwinFlowConfig, roles: dict[str, Role], guided_teacher: GuidedDenoiser, sampler: Sampler
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.parts = config.batch_parts(self.schedule, sampler.grid[0])
        self.student, self.target = (
            TwinDenoiser(_two_times(roles[name]), self.parts.low, self.parts.high)
            for name in ("student", "target" if "target" in roles else "student")
        )
        scale = guided_teacher.guidance_scale
        asked = roles["teacher"].single.denoiser if config.reference == "frozen" else self.target.student
        self.guide = guided_teacher.of(asked.velocity)
        self.ratio = config.ratio(one_number(scale, "data's velocity")) if config.velocity == "data" else 0.0
        if self.ratio and not self.guide.further:
            raise UserError("--enhanced_ratio needs classifier-free guidance, which this teacher lacks; leave it out")
        words = {*settled(config.parts)}
        # Where every step is short, or none, its target is the velocity itself.
        self.recursive = config.order > 0 and bool(words & {"e2e", "one", "any"})

    @classmethod
    def prepare(cls, config: TwinFlowConfig, bench: Bench) -> TwinFlow:
        """Make the roles: the student starts as the teacher, or as in --init."""
        config = config.resolved()
        names = ["target"] if config.target_decay else []
        if config.last_time is not None and not isinstance(bench.recording.schedule, FlowSchedule):
            raise UserError("--last_time is of flow-matching teachers; this one has times of its own: leave it out")
        roles = bench.make_flow_map_roles(*names, differentiated=False, told=_TOLD[config.sampler])
        bench.describe(trained_at_every_count=True)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler)

    def learning_rate(self, role: str) -> float:
        """Of the student."""
        return self.config.lr

    def target_decay(self, step: int) -> float:
        """How slowly the target follows the student."""
        return self.config.target_decay_at(step)

    @property
    def uneven(self) -> bool:
        """What is asked differs by the parts that a process has, and by how far their times are apart."""
        return True

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the student."""
        # 1. Points of the flow and of the twin's, whose data the student makes itself; it answers all of them at once.
        points = self.points(batch)
        twin = sent([part == "adv" for part in points.times.part], points.t.device, torch.bool)
        sign = 1 - 2 * twin.double()
        u = self.student(points.y, sign * points.t, sign * points.r, points.conditioning)

        # 2. What it shall say: of the twin the velocity, elsewhere by one step along the guided one and its own walk.
        target = self.recursion(points, u.detach(), self.velocity(points))
        each = self.weights(points, batch) * self.distance(u, target)
        log = {
            "student/base": self.mean(torch.where(twin, 0.0, each.detach()), batch, *BASE_PARTS),
            "student/twin": self.mean(torch.where(twin, each.detach(), 0.0), batch, "adv"),
        }
        loss = each.mean()

        # 3. One-step samples go where the flow and its twin differ.
        if self.config.matches:
            matching, gap = self.rectification(points, u, batch)
            loss = loss + matching
            log |= {"student/rectification": matching.detach(), "student/twin_gap": gap}
        yield Turn("student", [(loss, None)], log)

    # --- where -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def points(self, batch: Batch) -> Points:
        """The batch's samples, or the student's own, noised to the times of their parts."""
        times = self.parts.draw(batch.draws, batch.per_step or batch.size)
        t, r = times.on(batch.draws.device)
        t = self.student.known(t)
        x0, conditioning, kept = self.samples(batch, times)
        noise = batch.draws.normal("noise", batch.shape)
        y = expand(1 - t, x0) * x0 + expand(t, x0) * noise
        start = sent([part == "e2e" for part in times.part], t.device, torch.bool)
        y = torch.where(expand(start, y).bool(), self.start(noise), y)
        return Points(y, t, torch.minimum(r, t), times, noise - x0, conditioning, kept)

    def samples(self, batch: Batch, times: SignedTimes) -> tuple[Tensor, AnyConditioning, list[bool]]:
        """The samples (B, ...) that are noised, what they are of, and which of them kept their condition."""
        config, adv = self.config, times.rows("adv")
        conditioning, kept = batch.conditioning, [True] * batch.size
        if not config.image_free:
            given = batch.real if config.data is not None else batch.pairs
            conditioning = given.conditioning
        if self.ratio and config.reference == "student" and config.label_drop:
            dropped = batch.draws.coins("label_drop", config.label_drop)
            conditioning = without_condition(conditioning, dropped)
            kept = [not one for one in dropped]
        if not config.image_free and not adv:
            return given.x0, conditioning, kept
        noise = batch.draws.normal("fake_noise", batch.shape)
        if config.image_free:
            fake = sent([part == "adv" for part in times.part], noise.device, torch.bool)
            images = batch.draws.normal("image_noise", batch.shape)
            noise = torch.where(expand(fake, noise).bool(), noise, images)
            return self.one_step(noise, conditioning), conditioning, kept
        rows = sent(adv, noise.device, torch.int64)
        own = self.one_step(noise.index_select(0, rows), conditioning.select(adv))
        x0 = given.x0.index_copy(0, rows, own.to(given.x0.dtype))
        return x0, conditioning, kept

    def start(self, noise: Tensor) -> Tensor:
        """Where sampling starts from unit noise (B, ...), in rectified flow's coordinates."""
        top = torch.full((len(noise),), self.sampler.grid[0], dtype=torch.float64, device=noise.device)
        alpha, sigma = self.schedule.coefficients(top)
        return expand(self.sampler.initial_scale / (alpha + sigma), noise) * noise

    def one_step(self, noise: Tensor, conditioning: AnyConditioning) -> Tensor:
        """The student's sample (B, ...) in one step from unit noise (B, ...)."""
        y = self.start(noise)
        top = torch.full((len(y),), self.parts.high, dtype=torch.float64, device=y.device)
        return y - expand(top, y) * self.student(y, top, torch.zeros_like(top), conditioning)

    # --- what is to be said ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def velocity(self, points: Points) -> Tensor:
        """The velocity (B, ...) at the points: data's, guided where it is, or the guided teacher's; the twin's own."""
        config, line = self.config, points.line
        if config.velocity == "data" and not self.ratio:
            return line
        low, high = config.guidance_t_min, config.guidance_t_max
        rows = [row for row in points.base if low < points.times.t[row] < high and points.kept[row]]
        if not rows:
            return line
        index = sent(rows, line.device, torch.int64)
        x_t, t = self.student.own(points.y.index_select(0, index), points.t.index_select(0, index))
        told = points.conditioning.select(rows)
        if config.velocity == "teacher":
            there = self.guide(x_t, t, told)
        else:
            conditional, unconditional = self.guide.pair(x_t, t, told)
            there = line.index_select(0, index) + self.ratio * (conditional - unconditional)
        return line.index_copy(0, index, there.to(line.dtype))

    @torch.no_grad()
    def recursion(self, points: Points, u: Tensor, velocity: Tensor) -> Tensor:
        """What the student shall say (B, ...), where ``u`` (B, ...) is what it says."""
        rows = points.base
        if not self.recursive or not rows:
            return velocity
        far, first = [row for row in rows if self.is_far(points.times, row)], self.config.first_step
        integral, step = torch.zeros_like(u), torch.full_like(points.t, first)
        if far:
            index = sent(far, u.device, torch.int64)
            y, v, t, r = (of.index_select(0, index) for of in (points.y, velocity, points.t, points.r))
            later = torch.maximum(self.student.known(t - first), r)
            y = y - expand(t - later, y) * v
            walked = self.walk(y, later, r, points.conditioning.select(far))
            integral, step = integral.index_copy(0, index, walked.to(u.dtype)), step.index_copy(0, index, t - later)
        # Beside the first entries of a table there may be none that far away.
        some = sent([row in far for row in range(len(u))], u.device, torch.bool) & (step > first / 4)
        limit = self.config.target_clamp
        target = recursive_target(u, velocity, integral, points.t - points.r, step, some, limit)
        index = sent(rows, u.device, torch.int64)
        return velocity.index_copy(0, index, target.index_select(0, index).to(velocity.dtype))

    def is_far(self, times: SignedTimes, row: int) -> bool:
        """Whether a sample's step is at least as long as the first of its target's."""
        return times.t[row] >= times.r[row] + self.config.first_step

    def walk(self, y: Tensor, t: Tensor, r: Tensor, conditioning: AnyConditioning) -> Tensor:
        """The target's own way (B, ...) from y at t to r, in ``--order`` even steps: the sum of velocity times step."""
        order, way = self.config.order, torch.zeros_like(y)
        places = [torch.lerp(t, r, step / order) for step in range(order + 1)]
        times = [*(torch.maximum(self.student.known(time), r) for time in places[:-1]), r]
        for now, then in itertools.pairwise(times):
            move = expand(now - then, y) * self.target(y, now, then, conditioning)
            y, way = y - move, way + move
        return way

    def weights(self, points: Points, batch: Batch) -> Tensor:
        """The weight of each sample's error (B,)."""
        total, part = batch.per_step or batch.size, points.times.part
        weight = gap_weight(points.t - points.r) if self.config.weighting == "gap" else torch.ones_like(points.t)
        twin = sent([one == "adv" for one in part], weight.device, torch.bool)
        weight = torch.where(twin, self.config.adversarial_weight, weight)
        if self.config.order == 0:
            share = self.parts.share(PLAIN_PARTS, total)
            weight = weight * sent([(one in PLAIN_PARTS) / share for one in part], weight.device, torch.float64)
        return weight.to(points.y.dtype)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Between what is said and what shall be, of each sample (B,)."""
        return distance(self.config.distance, a, b, self.config.distance_alpha, self.config.distance_c)

    # --- distribution matching ---------------------------------------------------------------------------------------

    def rectification(self, points: Points, u: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss () that moves one-step samples by how the two velocities differ, and the size () of that."""
        rows = points.times.rows("e2e")
        if not rows:  # of this micro-batch
            return u.new_zeros(()), u.new_zeros(())
        index = sent(rows, u.device, torch.int64)
        y, t, said = (of.index_select(0, index) for of in (points.y, points.t, u))
        with torch.no_grad():
            sample, told = y - expand(t, y) * said, points.conditioning.select(rows)
            noise = batch.draws.normal("match_noise", batch.shape).index_select(0, index)
            s = self.student.known(batch.draws.uniform("match_time").index_select(0, index))
            there = expand(s, y) * noise + expand(1 - s, y) * sample
            both = torch.cat([-s, s])
            fake, real = self.student(torch.cat([there, there]), both, both, join([told, told])).chunk(2)
            apart = (fake - real).float() if y.dtype != torch.float64 else fake - real
            limit = self.config.target_clamp
            apart = apart if limit is None else apart.clamp(-limit, limit)
        each = self.distance(said, said.detach() - apart)
        gap = self.mean(apart.square().flatten(1).mean(1), batch, "e2e")
        return settled(self.config.match_weight) * self.mean(each, batch, "e2e"), gap

    def mean(self, each: Tensor, batch: Batch, *parts: str) -> Tensor:
        """The sum of ``each`` (N,), of some parts, by how many such rows a batch of this size has on average; ()."""
        share = self.parts.share(parts, batch.per_step or batch.size)
        return each.sum() / (batch.size * share) if share else each.new_zeros(())


def _two_times(role: Role) -> FlowMapDenoiser:
    denoiser = role.denoiser
    assert isinstance(denoiser, FlowMapDenoiser)  # as the bench makes it
    return denoiser


if __name__ == "__main__":
    main("twin_flow")
