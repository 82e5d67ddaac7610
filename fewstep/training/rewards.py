"""Rewards of a student's pictures: the term of its loss, and what is looked at beside it so that it is not deceived.

A method that rewards its student derives its settings from :class:`fewstep.config.reward.RewardConfig`, calls
``fewstep.trainers._rewards.open_rewards(config, bench, roles)``, which gives None without ``--reward``, and

- adds :meth:`Rewards.term` of the x0 of its walk's **last** step, which must carry the gradient, to the student's loss,
  in steps where :meth:`Rewards.begun` holds;
- adds :meth:`Rewards.look` to a turn's log where :meth:`Rewards.due` says so.

:meth:`Rewards.scores` is for methods that rank samples by their reward (preference learning): call it without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.config.reward import RewardConfig
from fewstep.data.batch import Asked, Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, draw_sample
from fewstep.errors import UserError, one_line
from fewstep.losses.reward import pair_distance, reward_loss, weighted_reward

#: Where the teacher is asked what it would change of a picture.
_FIT_AT = 0.5


class Reward(Protocol):
    """A differentiable number of each picture. A dotted class of ``--reward`` is made with ``(device)``."""

    def __call__(self, pictures: Tensor, asked: Asked) -> Tensor:
        """How good pictures are, higher is better.

        Args:
            pictures: float32 (B, C, H, W), in [0, 1] where they are within the pipeline's range, not clipped.
            asked: the prompt or label of each; None of an unconditional teacher.

        Returns:
            (B,), with gradient to the pictures.
        """
        ...


@dataclass(frozen=True)
class Rewards:
    """What a student is rewarded by, and what its pictures are looked at by besides.

    Attributes:
        config: of the run.
        rewards: by a short name, for the log.
        beside: the metric that is not optimised; None: how little the teacher would change.
        beside_name: of it, for the log.
        pictures: from x0 (B, ...) to pictures (B, C, H, W), with gradient.
        teacher: unguided.
        look_steps: between looks; 0 for none.
    """

    config: RewardConfig
    rewards: Mapping[str, Reward]
    beside: Reward | None
    beside_name: str
    pictures: Callable[[Tensor], Tensor]
    teacher: Denoiser
    look_steps: int

    def each(self, pictures: Tensor, asked: Asked) -> Tensor:
        """Every reward of each picture: (B, n) of pictures (B, C, H, W), with gradient.

        Raises:
            UserError: a reward fails, or is no number of each picture.
        """
        return torch.stack([_numbers(name, reward, pictures, asked) for name, reward in self.rewards.items()], 1)

    def scores(self, x0: Tensor, asked: Asked) -> Tensor:
        """The weighted sum of all rewards (B,) of samples (B, ...), with gradient where there is any."""
        return weighted_reward(self.each(self.pictures(x0), asked), self.shares)

    @property
    def shares(self) -> list[float]:
        """The weight of each reward in their sum."""
        return self.config.reward_shares or [1.0] * len(self.rewards)

    def begun(self, step: int) -> bool:
        """Whether the student's loss has the term in this step."""
        return self.config.reward_weight > 0 and step >= self.config.reward_start_step

    def term(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The term of the student's loss (), weighted, and what to log.

        Args:
            x0: the student's samples (B, ...) of its last step, with gradient.
            batch: of this step.

        Raises:
            UserError: a reward fails, is no number of each picture, or has no gradient.
        """
        rewards = self.each(self.pictures(x0), batch.asked)
        if x0.requires_grad and not rewards.requires_grad:
            raise UserError(
                f"--reward {self.config.reward} has no gradient to the pictures, which no student can follow; give one "
                "that is differentiable"
            )
        loss = reward_loss(rewards, self.shares, self.config.reward_margin or ())
        return self.config.reward_weight * loss, {"student/reward_loss": loss.detach()}

    def due(self, step: int, every: int = 1) -> bool:
        """Whether the student is looked at in this step; ``every``: steps between two turns of the student."""
        return self.look_steps > 0 and step % (every * -(-self.look_steps // every)) == 0

    @torch.no_grad()
    def look(self, student: Denoiser, sampler: Sampler, batch: Batch) -> dict[str, Tensor]:
        """How the student stands, of two whole walks for each condition of a batch, for the log.

        Returns:
            ``student/reward`` (and each of several), ``student/unrewarded_<name>``: the metric that is not optimised,
            and ``student/pair_diversity``: the root mean square distance of the two pictures of one condition.
        """

        def walk(prefix: str) -> Tensor:
            return draw_sample(student, sampler, batch.draws, batch.shape, batch.conditioning, prefix=prefix)

        x0 = walk("look_")
        shown, other = self.pictures(x0), self.pictures(walk("look_again_"))
        each = self.each(shown, batch.asked)
        log = {"student/reward": weighted_reward(each, self.shares).mean()}
        if len(self.rewards) > 1:
            log |= {f"student/reward_{name}": each[:, place].mean() for place, name in enumerate(self.rewards)}
        unrewarded = (
            self.fit(x0, sampler, batch)
            if self.beside is None
            else _numbers(self.beside_name, self.beside, shown, batch.asked).mean()
        )
        log[f"student/unrewarded_{self.beside_name}"] = unrewarded
        return log | {"student/pair_diversity": pair_distance(shown, other).mean()}

    def fit(self, x0: Tensor, sampler: Sampler, batch: Batch) -> Tensor:
        """How little the teacher would change noised samples (B, ...): minus mean|x0 - x0_T| over mean|x0|, ()."""
        t = torch.full((batch.size,), _FIT_AT, dtype=torch.float64, device=x0.device)
        noise = batch.draws.normal("look_fit", batch.shape)
        x_t = add_noise(x0, noise, sampler.schedule.coefficients(t))
        return -(x0 - self.teacher(x_t, t, batch.conditioning)).abs().mean() / x0.abs().mean()


def _numbers(name: str, reward: Reward, pictures: Tensor, asked: Asked) -> Tensor:
    """A reward's numbers (B,), float32.

    Raises:
        UserError: it fails, or gives something else.
    """
    try:
        found: object = reward(pictures, asked)
    except (UserError, MemoryError, torch.OutOfMemoryError):  # these say what to do
        raise
    except Exception as error:  # a class of the user's raises whatever it does
        who = type(reward).__name__
        raise UserError(f"the reward {name} ({who}) failed on {len(pictures)} pictures: {one_line(error)}") from error
    if isinstance(found, Tensor) and found.shape == pictures.shape[:1]:
        return found.float()
    what = f"numbers of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise UserError(f"the reward {name} of {len(pictures)} pictures is {what}; it must be one number for each")
