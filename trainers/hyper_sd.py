"""Hyper-SD: trajectories in segments, human feedback, and score distillation of one step (Ren et al. 2024, 2404.13686).

The student first learns to jump along its teacher's trajectories, in 8, 4, 2 and 1 segments; then its one-step pictures
are driven to what people like, and their distribution to the teacher's. One student or adapter then makes 1 to 8 steps.

    accelerate launch -m fewstep.trainers.hyper_sd --teacher DIR --prompts FILE --data DIR --lora_rank 64 \\
        --stages tscd:16000,feedback:2000,score --reward aesthetic --reward_margin [6.5] --out OUT

- ``tscd``: :mod:`fewstep.trainers.segmented_consistency`
- ``feedback``: the hinge of ``--reward`` (weights of the user's) on the decoded one-step prediction
- ``score``: DMD2's matching of the one-step samples with a critic, the trajectories' loss beside it, and the reward

One command, one optimizer and one average for all stages; it is resumed in any of them. After ``score`` a one-step
sample lies on no trajectory of the teacher: several steps want some new noise between them (``--renoise tcd``).

Departures: feedback trains the trajectories' own weights or adapter further, where the paper has a second LoRA that is
merged; hence the trajectories' loss goes on beside it (``--trajectory_weight 0``: not so). Margins, weights and lengths
are not published. The one-step prediction is that from noise. The loss by instance segmentation is not here: no network
of that kind is known to fewstep. The critic starts as the teacher, as DMD2's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.cli.distill import main
from fewstep.critic.denoising import CLEANEST, critic_denoising
from fewstep.critic.matching import DistributionMatching, Matched
from fewstep.data.batch import Batch
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.rollout import draw_sample
from fewstep.trainers._hyper_sd_config import HyperSdConfig
from fewstep.trainers._rewards import open_rewards
from fewstep.trainers.segmented_consistency import SegmentedConsistency
from fewstep.training.method import Bench, Turn
from fewstep.training.rewards import Rewards

#: What is sent backward of the student's turn, and what to log.
Pieces = tuple[list[tuple[Tensor, Tensor | None]], dict[str, Tensor]]


class HyperSd:
    """The method; see the module. Roles: those of segmented consistency, and the critic where there is a stage score.

    Args:
        config: of the run.
        trajectories: the first stage, whose roles and sampler are the run's.
        shift: of the times at which teacher and critic are compared.
        rewards: of the one-step predictions.
    """

    Config = HyperSdConfig

    def __init__(
        self,
        config: HyperSdConfig,
        trajectories: SegmentedConsistency,
        shift: float = 1.0,
        rewards: Rewards | None = None,
    ) -> None:
        config = config.resolved()
        self.config, self.trajectories, self.rewards = config, trajectories, rewards
        self.roles, self.sampler = trajectories.roles, trajectories.sampler
        self.student, self.teacher = trajectories.student, trajectories.teacher
        #: One step from noise, which ends at the clean sample.
        self.one_step = replace(self.sampler, grid=self.sampler.grid[:1], renoise="ode")
        self.compared = Renoiser(self.sampler.schedule, config.time_min, config.time_max, shift)
        self.learnt = Renoiser(self.sampler.schedule, CLEANEST, 1.0, shift)

    @classmethod
    def prepare(cls, config: HyperSdConfig, bench: Bench) -> HyperSd:
        """Make the roles: student, target and critic start as the teacher, or as in --init."""
        config = config.resolved()
        others = ["critic"] if "score" in config.starts() else []
        trajectories = SegmentedConsistency.prepare(config, bench, *others)
        rewards = open_rewards(config, bench, trajectories.roles["teacher"])
        shift = config.shift_of_times(bench.sampler.schedule, bench.shift)
        return cls(config, trajectories, shift, rewards)

    def learning_rate(self, role: str) -> float:
        """Of a role in the run's first stage."""
        return self.config.rate(role, 0)

    def learning_rate_at(self, role: str, step: int) -> float:
        """Of a role in the stage of ``step``."""
        return self.config.rate(role, step)

    def target_decay(self, step: int) -> float:
        """How slowly the target follows the student."""
        return self.trajectories.target_decay(step)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn]:
        """The student's update with what its stage adds; in stage score one every ``critic_updates`` steps."""
        stage, first = self.config.stage_at(step)
        log: dict[str, Tensor] = {}
        if self.rewards is not None and self.rewards.due(step):
            log = self.rewards.look(self.student, self.sampler, batch)

        # 1. A one-step sample, with gradient where the student is updated by it.
        moves = stage != "score" or (step - first) % self.config.critic_updates == 0
        x0 = None
        if stage != "tscd":
            with torch.set_grad_enabled(moves):
                x0 = draw_sample(
                    self.student, self.one_step, batch.draws, batch.shape, batch.conditioning, prefix="one_step_"
                )

        # 2. The student: the trajectories' loss, in later stages with the reward and the match of its one-step sample.
        if moves:
            yield from self.student_turns(step, batch, x0, stage == "score", log)
            log = {}

        # 3. The critic: denoise that sample.
        if stage == "score" and x0 is not None:
            x0 = x0.detach()
            loss, said = critic_denoising(self.roles["critic"], self.roles["teacher"], x0, batch, self.learnt)
            yield Turn("critic", [(loss, None)], log | said)

    def student_turns(
        self, step: int, batch: Batch, x0: Tensor | None, matched: bool, log: dict[str, Tensor]
    ) -> Iterator[Turn]:
        """The update of the student, and of the trajectories' discriminator where there is one.

        Args:
            step: of the run.
            batch: of this step.
            x0: its one-step sample (B, ...), with gradient; None in stage tscd.
            matched: whether that is matched with the teacher's distribution.
            log: what there is to log besides.
        """
        pieces, said = ([], {}) if x0 is None else self.one_step_pieces(x0, step, batch, matched)
        weight = 1.0 if x0 is None else self.config.trajectory_weight
        if weight == 0:
            yield Turn("student", pieces, log | said)
            pieces.clear()
            return
        for turn in self.trajectories.turns(step, batch):
            if turn.role == "student":
                turn.backward = [(weight * loss, gradient) for loss, gradient in turn.backward] + pieces
                turn.log |= log | said
            yield turn
            turn.backward.clear()  # the graph is spent; a generator holds none across a yield
            pieces.clear()

    def one_step_pieces(self, x0: Tensor, step: int, batch: Batch, matched: bool) -> Pieces:
        """What the one-step samples (B, ...) are driven by."""
        pieces: list[tuple[Tensor, Tensor | None]] = []
        log: dict[str, Tensor] = {}
        if matched:
            gradient, log = self.matching(x0.detach(), batch)
            pieces.append((x0, gradient))
        if self.rewards is not None and self.rewards.begun(step):
            loss, said = self.rewards.term(x0, batch)
            pieces.append((loss, None))
            log |= said
        return pieces, log

    def matching(self, x0: Tensor, batch: Batch) -> Matched:
        """DMD2's gradient (B, ...) at one-step samples (B, ...), weighted, and what to log."""
        match = DistributionMatching(self.teacher, self.roles["critic"], self.compared, self.config.normalizer_min)
        gradient, log = match(x0, batch, self.one_step.grid[0])
        return self.config.score_weight * gradient, log


if __name__ == "__main__":
    main("hyper_sd")
