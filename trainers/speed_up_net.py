"""SpeedUpNet (2023, arXiv 2312.08887): an adapter on the attention to the text, for few steps without guidance.

The network stays as it is. Each of its attentions to the text gets an offset for the prompt and one for the negative
prompt, out(A0 - offset(c-) + offset(c+)), which learn what guidance adds, and to make one step of several of the
teacher's. As no weight of the network changes, the adapter is plugged into fine-tuned copies of it (``fewstep.plug``).

    accelerate launch -m fewstep.trainers.speed_up_net --teacher DIR --prompts FILE --steps 4 --out OUT

Two distances, at the times at which the student is sampled: to what the guided teacher says of the same sample (the
negative-prompt offset), and to where the guided teacher's ODE is after ``--solver_steps`` of its own (multi-step
consistency). Negative prompts are the usual one, or another prompt of the run; where samples are told pictures, whose
negatives hold them, too, it is each sample's own.

Departures: no trainer was published, so that losses, weights and times are read out of the abstract. Both distances are
of velocities noise - x0, the ODE's being the straight line's to where it leads, so that they weigh alike in every
family of teachers. Norms are those of single samples, where the released code takes them over the batch. Keys and
values begin as the network's own; with ``--lora_rank`` they are the network's own, plus a product of low rank, of the
copy that the adapter is plugged into. Where picture and text attend jointly (MMDiT), which the paper does not have, the
picture's queries ask the tokens as the network embeds them, and the text gets no offset. The adapter is told no time
and no guidance: queries know the one, and the other is trained in, so a drawn one (``--guidance_min``,
``--guidance_max``, the paper's 5 to 10) comes to its mean. Without ``--data`` samples of the teacher are noised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.conditioning.ragged import AnyConditioning, join, with_others
from fewstep.data.batch import Batch
from fewstep.diffusion.ode import solver_step
from fewstep.diffusion.pinned import pinned_under
from fewstep.diffusion.prediction import add_noise, expand
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.timesteps import uniform_times
from fewstep.diffusion.windows import Window, line, slope, solver_times
from fewstep.losses.consistency import distance
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.networks.speed_up import SpeedUpDenoiser
from fewstep.sending import sent
from fewstep.trainers._speed_up_net_config import SpeedUpNetConfig
from fewstep.training.method import Bench, Turn


class SpeedUpNet:
    """The method; see the module. Roles: student, teacher, ema if asked for, all of them on one network."""

    Config = SpeedUpNetConfig

    def __init__(
        self,
        config: SpeedUpNetConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        shift: float = 1.0,
        *,
        pictured: bool = False,
    ) -> None:
        """``pictured``: samples are told pictures; the rest is as :meth:`prepare` makes it."""
        config = config.resolved()
        self.config, self.roles, self.sampler, self.schedule = config, roles, sampler, sampler.schedule
        self.student, self.teacher, self.shift, self.pictured = roles["student"], guided_teacher, shift, pictured

    @classmethod
    def prepare(cls, config: SpeedUpNetConfig, bench: Bench) -> SpeedUpNet:
        """Make the roles: the student is the teacher under an adapter that changes nothing where prompts are alike."""
        config = config.resolved()
        roles = bench.make_plugged_roles()
        config.refuse_teacher(bench.sampler.schedule, bench.sampler.grid[0], bench.guidance_scale)
        bench.describe(counts=(config.steps,), grids={config.steps: bench.grids[config.steps]})
        pictured = bench.recording.conditional == "item"
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, bench.shift, pictured=pictured)

    def learning_rate(self, role: str) -> float:
        """Of the adapter."""
        return self.config.lr

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """One update of the adapter in every step."""
        # 1. Noised samples at the student's own times, where its steps end, and what they shall be and not be.
        samples = batch.real if self.config.data is not None else batch.pairs
        window = self.window(batch)
        noise = batch.draws.normal("noise", batch.shape)
        x_t = self.start(samples.x0, noise, window.start)
        negative = self.negatives(batch, samples.conditioning)

        # 2. What the guided teacher says there, and where its ODE leads.
        scale = self.guidance_scale(batch)
        said, x_s = self.walk(x_t, window, samples.conditioning, negative, noise, scale)

        # 3. The same of the student in one call, without guidance.
        student = self.student.denoiser
        assert isinstance(student, SpeedUpDenoiser)  # as prepare made it
        x0 = student.against(x_t, window.start, samples.conditioning, negative)

        # 4. How far are the two apart?
        ours = self.velocity(x_t, x0, window.start)
        offset = self.distance(ours, self.velocity(x_t, said, window.start))
        loss = self.config.offset_weight * offset
        log = {"student/offset": offset.detach()}
        if self.config.consistency_weight:
            consistency = self.distance(ours, self.mean_velocity(x_t, x_s, window))
            loss = loss + self.config.consistency_weight * consistency
            log |= {"student/consistency": consistency.detach()}
        log |= {"student/x0_std": x0.detach().std(), "student/teacher_std": said.std()}
        yield Turn("student", [(loss, None)], log)

    def window(self, batch: Batch) -> Window:
        """One of the student's steps for each sample."""
        grid = sent((*self.sampler.grid, 0.0), batch.draws.device, torch.float64)
        place = batch.draws.integers("grid_step", 0, len(grid) - 1)
        return Window(grid[place], grid[place + 1])

    def start(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised samples (B, ...) at ``t`` (B,); at the first time what the sampler starts from, which has no x0."""
        x_t = add_noise(x0, noise, self.schedule.coefficients(t))
        first = expand(t >= self.sampler.grid[0], x0).bool()
        return torch.where(first, self.sampler.initial_scale * noise, x_t)

    def negatives(self, batch: Batch, own: AnyConditioning) -> AnyConditioning:
        """Of each sample: the usual negative prompt, or one of the batch's prompts, which the samples do not follow.

        Of samples that are told pictures as ``own`` says, it is their own: another's holds another picture.
        """
        if self.pictured:
            return own.others[0]
        usual, others = batch.conditioning.others[0], batch.conditioning.alone()
        coins = batch.draws.coins("other_negative", self.config.negative_share)
        if not any(coins):
            return usual
        return join([(others if other else usual).select([place]) for place, other in enumerate(coins)])

    def guidance_scale(self, batch: Batch) -> Tensor | None:
        """Of each sample (B,), where it is drawn."""
        drawn = self.config.guidance_range
        return None if drawn is None else uniform_times(batch.draws.uniform("guidance_scale"), *drawn)

    @torch.no_grad()
    def walk(
        self,
        x_t: Tensor,
        window: Window,
        conditioning: AnyConditioning,
        negative: AnyConditioning,
        noise: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the guided teacher says of ``x_t`` (B, ...), x0, and where its ODE is at the windows' ends.

        ``noise``: that of ``x_t``, (B, ...).
        """
        # Pictures may have a third answer.
        conditioning = conditioning if self.pictured else with_others(conditioning, [negative])
        said = list[Tensor]()

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            said.append(self.teacher(x, t, conditioning, guidance_scale=guidance_scale))
            return said[-1]

        if not self.config.consistency_weight:
            return denoise(x_t, window.start), x_t
        times, x = solver_times(window, self.config.solver_steps, self.schedule, self.shift), x_t
        for begins, ends in itertools.pairwise(times):
            moved = solver_step(denoise, self.schedule, x, begins, ends, self.config.solver)
            x = pinned_under(noise, conditioning, self.schedule, moved, ends)
        return said[0], x

    def velocity(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """noise - x0 (B, ...), of the x0 that was said at ``t`` (B,)."""
        alpha, sigma = self.schedule.coefficients(t)
        return (x_t - expand(alpha + sigma, x_t) * x0) * expand(1 / sigma, x_t)

    def mean_velocity(self, x_t: Tensor, x_s: Tensor, window: Window) -> Tensor:
        """That of the straight line from ``x_t`` to ``x_s`` (B, ...), on which one step of an ODE sampler goes."""
        (size_t, start), (size_s, end) = (line("velocity", self.schedule, t) for t in (window.start, window.end))
        return slope(x_t / expand(size_t, x_t), x_s / expand(size_s, x_s), start, end)

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The mean over all samples, a scalar."""
        return distance(self.config.distance, ours, theirs).mean()


if __name__ == "__main__":
    main("speed_up_net")
