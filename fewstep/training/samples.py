"""Samples of a run's roles from keyed noise, and pictures of them, in batches of the size that training fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig
from fewstep.data.conditions import Conditions
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler, draw_sample, ode_sampler
from fewstep.recording import Recording
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import without_safety_checker

#: Of a teacher when it is looked at.
TEACHER_STEPS = 25


def _go_on() -> None:
    """Nobody wants to stop."""


class Samples:
    """Makes samples of one run. Sample i has the condition i of the run's, which are taken in turn.

    Args:
        config: of the run.
        recording: of the teacher.
        conditions: of the run.
        device: of the networks.
        with_default_guidance: adds to a conditioning what the networks are told beside it (their guidance).
    """

    def __init__(
        self,
        config: RunConfig,
        recording: Recording,
        conditions: Conditions,
        device: torch.device,
        with_default_guidance: Callable[[AnyConditioning], AnyConditioning],
    ) -> None:
        self.seed, self.at_once = config.seed, config.batch_size
        self.recording, self.conditions, self.device = recording, conditions, device
        self._told = with_default_guidance

    @property
    def teacher_sampler(self) -> Sampler:
        """How a teacher moves when it is looked at."""
        return ode_sampler(self.recording.schedule, TEACHER_STEPS)

    def batches(self, count: int) -> list[Sequence[int]]:
        """The samples 0 to ``count`` - 1, as many at a time as training fits, each time those of one size."""
        of_size: dict[tuple[int, ...], list[int]] = {}
        for index in range(count):
            of_size.setdefault(self.conditions.shape(index % len(self.conditions)), []).append(index)
        some = of_size.values()
        return [each[first : first + self.at_once] for each in some for first in range(0, len(each), self.at_once)]

    def picture_size(self) -> tuple[int, int] | None:
        """Height and width of the first sample's picture where there are other sizes; None where all have one."""
        if len(self.conditions.sizes()) == 1:
            return None
        height, width = self.recording.decode(torch.zeros(1, *self.conditions.shape(0))).shape[-2:]
        return height, width

    @torch.no_grad()
    def x0(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        step: int,
        indices: Sequence[int],
        pause: Callable[[], None] = _go_on,
    ) -> Tensor:
        """Samples (B, ...) of some indices of one size, from the draws of a ``step`` of :mod:`fewstep.diffusion.draws`.

        ``pause`` is called before each network call.
        """
        draws = Draws(self.seed, step, indices, self.device)
        rows = [index % len(self.conditions) for index in indices]
        conditioning, shape = self._told(self.conditions.select(rows)), self.conditions.shape(rows[0])
        return draw_sample(denoiser, sampler, draws, shape, conditioning, on_step=lambda *_: pause())

    @torch.no_grad()
    def pictures(self, x0: Tensor, indices: Sequence[int], pause: Callable[[], None] = _go_on) -> Tensor:
        """Images (N, C, H, W) or videos (N, C, F, H, W) in [0, 1], float32 on the host, of x0 (N, ...).

        ``indices``: of the N samples, whose items may have a part in their pictures.
        ``pause`` is called before as many are decoded as training fits.
        """
        made = []
        # The checker's word is for those who are shown pictures; here they show how the training goes.
        with without_safety_checker(self.recording.pipeline):
            for first, some in zip(range(0, len(x0), self.at_once), x0.split(self.at_once), strict=True):
                pause()
                told = self._told_of(indices[first : first + len(some)])
                made.append(self.recording.decode(some.to(self.device), told).float().cpu())
        return torch.cat(made)

    def _told_of(self, indices: Sequence[int]) -> AnyConditioning | None:
        """What samples are told, where a part of their pictures comes from their items."""
        if self.recording.between is None:
            return None
        return self.conditions.select([index % len(self.conditions) for index in indices])

    def asked(self, count: int) -> list[str] | list[int] | None:
        """The prompts or labels of the samples 0 to ``count`` - 1; None for an unconditional teacher."""
        items = self.conditions.texts()
        return [items[index % len(items)] for index in range(count)] if items else None

    def why_no_pictures(self) -> str:
        """Why no pictures can be made, in words; "" where they can."""
        try:
            _ = self.recording.codec
        except RecordingError as error:
            return str(error)
        return ""
