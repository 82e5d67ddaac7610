"""Phased DMD (arXiv 2510.27684): distribution matching in subintervals of the SNR, an expert for each, noisiest first.

An expert learns to bring samples to the teacher's *noisy* distribution where its phase ends; only the last one makes
clean samples. So there are no clean samples for the critic either: it learns on noisier ones, by a target that is
unbiased although it knows none. Every phase has a new critic, starts where the finished experts arrive, and leaves them
alone.

    accelerate launch -m fewstep.trainers.phased_dmd --teacher DIR --prompts FILE --steps 4 --phases [2,2] --out OUT

Departures: the normalised gradient acts on the x0 that a step implies, as in LightX2V's trainer, and not on the sample
at the phase's end, which follows it in proportion (the paper's own choice is unknown to us); times keep a margin from
the end of the phase, as there. An average, where there is one, takes its expert's place when a phase is done, and is
what is walked through then. Where the teacher is two
networks, so is each critic, and the last phase trains both, as the paper does. Not here: LightX2V's diversity loss, its
real-video critics, and mixing the student into the critic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.config.critic import ScoreConfig
from fewstep.critic.denoising import CLEANEST, critic_denoising, sample_log
from fewstep.critic.matching import Matched, matching_log
from fewstep.data.batch import Batch
from fewstep.diffusion.phases import Phase, default_lengths, make_phases
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import Sampler, draw_sample, jump
from fewstep.errors import UserError
from fewstep.losses.score import distribution_matching, subinterval_weight
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.training.method import Bench, Renew, Turn


@dataclass(kw_only=True)
class PhasedDmdConfig(ScoreConfig):
    """Phased DMD.

    Args:
        phases: number of the student's steps in each phase, noisiest first; default two halves (paper: [2,2]).
        phase_steps: training steps of each phase but the last, which goes on to the end; default equal shares.
        order: sequential (the paper's: a phase is finished before the next) or alternating (LightX2V's: in turns).
        time_margin: how much noisier than a phase's end, before the shift, teacher and critic look (LightX2V: 0.02).
        early_time_min: lowest time at which teacher and critic look before the last phase (paper, Wan 2.2: where the
            teacher's noisier network ends, 0.875 for text and 0.9 for images); default the end of the phase.
        weight_cap: bound of 1 / sigma_ts^2 in the critic's weight (paper: 10); 0 for no weight (LightX2V).
        renoise: how the student moves between steps: ode (the paper's), fresh, or auto.
    """

    phases: list[int] | None = None
    phase_steps: int | None = None
    order: str = "sequential"
    time_margin: float = 0.02
    early_time_min: float | None = None
    weight_cap: float = 10.0
    renoise: str = "ode"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_set("is used by no part of Phased DMD", "data")
        self._refuse_negative("time_margin", "weight_cap")
        self._refuse_unknown("order", "sequential", "alternating")
        if self.early_time_min is not None and not 0 < self.early_time_min < 1:
            raise UserError(f"--early_time_min must be in (0, 1), not {self.early_time_min}")
        phases = self.lengths
        make_phases(range(self.steps, 0, -1), phases)  # refuses phases that do not cover the steps
        if self.order == "alternating":
            if self.phase_steps is not None:
                raise UserError("--phase_steps belongs to --order sequential: leave it out")
            return
        each = self.steps_of_each
        if each < 1 or each * (len(phases) - 1) >= self.max_steps:
            raise UserError(
                f"--max_steps {self.max_steps} end before the last of {len(phases)} phases of --phase_steps "
                f"{each} begins; give more steps, or shorter phases"
            )

    def consequences(self) -> dict[str, Any]:
        """The phases, and their steps: a run that is to go on with more steps is told the phases that it had."""
        each = {"phase_steps": self.steps_of_each} if self.order == "sequential" else {}
        return super().consequences() | {"phases": self.lengths} | each

    @property
    def lengths(self) -> list[int]:
        """Of each phase, in steps of the student, noisiest first."""
        return default_lengths(self.steps) if self.phases is None else self.phases

    @property
    def steps_of_each(self) -> int:
        """Training steps of each phase but the last, in sequential order."""
        return max(1, self.max_steps // len(self.lengths)) if self.phase_steps is None else self.phase_steps


class PhasedDmd:
    """The method; see the module. Roles: student (an expert for each phase), teacher, critic, and ema if asked for.

    In alternating order every phase has a critic of its own: critic, critic_2, ...
    """

    Config = PhasedDmdConfig

    def __init__(
        self,
        config: PhasedDmdConfig,
        roles: dict[str, Role],
        guided_teacher: GuidedDenoiser,
        sampler: Sampler,
        phases: Sequence[Phase],
        shift: float = 1.0,
    ) -> None:
        config = config.resolved()
        self.config, self.roles, self.sampler, self.phases = config, roles, sampler, phases
        self.student, self.teacher = roles["student"], guided_teacher
        self.critics = [roles[name] for name in critic_names(config, len(phases))]
        compared = Renoiser(sampler.schedule, config.time_min, config.time_max, shift)
        learnt = Renoiser(sampler.schedule, CLEANEST, 1.0, shift)
        # Nested: whatever is noisier than the end of a phase, also what is noisier than its start.
        early = [None if phase.anchor is None else config.early_time_min for phase in phases]
        ends = [(phase.anchor, config.time_margin) for phase in phases]
        self.compared = [compared.above(*end).not_below(t) for end, t in zip(ends, early, strict=True)]
        self.learnt = [learnt.above(*end).not_below(t) for end, t in zip(ends, early, strict=True)]
        self.emphasis = partial(subinterval_weight, cap=config.weight_cap) if config.weight_cap else None

    @classmethod
    def prepare(cls, config: PhasedDmdConfig, bench: Bench) -> PhasedDmd:
        """Make the roles: experts and critic start as the teacher, or as in --init."""
        config = config.resolved()
        phases = make_phases(bench.sampler.grid, config.lengths)
        roles = bench.make_phased_roles(phases, *critic_names(config, len(phases)))
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, roles, bench.guided(roles["teacher"]), bench.sampler, phases, shift)

    def learning_rate(self, role: str) -> float:
        """Of the student or a critic."""
        return self.config.learning_rate(role)

    def place(self, step: int) -> tuple[int, int]:
        """The phase that is trained in a step, and how many steps it was trained before."""
        if self.config.order == "alternating":
            return step % len(self.phases), step // len(self.phases)
        number = min(step // self.config.steps_of_each, len(self.phases) - 1)
        return number, step - number * self.config.steps_of_each

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Renew]:
        """Every ``critic_updates`` steps the phase's expert, and in every step the critic on the same sample."""
        # 0. A new phase: a new critic; the average of the finished expert takes its place.
        number, before = self.place(step)
        phase, critic = self.phases[number], self.critics[number]
        if self.config.order == "sequential" and number > 0 and before == 0:
            yield Renew(critic.name, like="teacher")
            yield Renew("student", like="ema" if "ema" in self.roles else "student")

        # 1. Walk to one of the phase's steps, and jump from there to where the phase ends (SGTS within the phase).
        last = batch.draws.shared_integer("student_step", phase.steps.start, phase.steps.stop)
        student_turn = before % self.config.critic_updates == 0
        inputs: dict[int, Tensor] = {}
        with torch.set_grad_enabled(student_turn):
            walk = (self.student, self.sampler, batch.draws, batch.shape, batch.conditioning, last)
            x0 = draw_sample(*walk, on_step=inputs.__setitem__)
        x_s = self.arrive(x0.detach(), inputs[last], last, phase, batch)

        # 2. The expert: distribution matching on noisier samples than those at the phase's end.
        if student_turn:
            gradient, log = self.matching(x0.detach(), x_s, batch, number)
            yield Turn("student", [(x0, gradient)], log)

        # 3. The critic: denoise the same samples, which are noisy already unless the phase is the last.
        teacher = self.roles["teacher"]
        loss, log = critic_denoising(critic, teacher, x_s, batch, self.learnt[number], self.emphasis)
        yield Turn(critic.name, [(loss, None)], log)

    @torch.no_grad()
    def arrive(self, x0: Tensor, x_t: Tensor, last: int, phase: Phase, batch: Batch) -> Tensor:
        """The sample (B, ...) at the end of the phase, from what the student said at ``x_t`` of its step ``last``."""
        if phase.anchor is None:
            return x0
        t = self.sampler.times(last, x0)
        fresh = batch.draws.normal("arrival_noise", batch.shape) if self.sampler.renoise == "fresh" else None
        return jump(self.sampler, x_t, x0, last, torch.full_like(t, phase.anchor), fresh, batch.conditioning)

    @torch.no_grad()
    def matching(self, x0: Tensor, x_s: Tensor, batch: Batch, number: int) -> Matched:
        """Gradient at ``x0`` (B, ...) from the verdicts on its sample ``x_s`` (B, ...), and what to log."""
        x_t, t, _ = self.compared[number](x_s, batch.draws, "matching")
        x0_teacher = self.teacher(x_t, t, batch.conditioning)
        x0_critic = self.critics[number](x_t, t, batch.conditioning)
        loss, gradient = distribution_matching(x0, x0_teacher, x0_critic, self.config.normalizer_min)
        return gradient, matching_log(loss) | sample_log(x0, x0_teacher)


def critic_names(config: PhasedDmdConfig, phases: int) -> list[str]:
    """The critic of each phase: one for all, renewed, or in alternating order one for each."""
    if config.order == "sequential":
        return ["critic"] * phases
    return ["critic", *(f"critic_{k}" for k in range(2, phases + 1))]


if __name__ == "__main__":
    main("phased_dmd")
