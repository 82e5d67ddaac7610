"""Samples of a run, the teacher's beside the student's, of the same noise and conditions: as a grid and as numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig
from fewstep.data.conditions import Conditions
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import PREVIEWS_STEP, Draws
from fewstep.diffusion.rollout import Sampler, draw_sample, ode_sampler
from fewstep.recording import Recording
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import without_safety_checker
from fewstep.training.pictures import save_grid
from fewstep.training.spread import beside

_SHOWN = 8  # samples in a grid
_TEACHER_STEPS = 25  # of the teacher's row in it


class Previews:
    """Makes the grids of one run; the teacher's row is made once.

    Args:
        config: of the run.
        recording: of the teacher.
        conditions: of the run, of which the first are shown.
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
        self.config, self.recording, self.conditions, self.device = config, recording, conditions, device
        self.with_default_guidance = with_default_guidance
        self._teacher: Tensor | None = None  # its samples, and their pictures
        self._teacher_pictures: Tensor | None = None
        #: Why no grid is made, though grids were asked for; else empty.
        self.note = ""
        if config.sample_steps:
            try:
                _ = recording.codec
            except RecordingError as error:
                self.note = f"no sample grids: {error}"

    def save(
        self,
        path: Path | None,
        teacher: Denoiser,
        student: Denoiser,
        sampler: Sampler,
        pause: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Write the grid, where one can be made.

        Args:
            path: of the grid; without it the samples are made alone, for a process that takes part in them.
            teacher: under its guidance.
            student: walked by ``sampler``.
            sampler: of the student.
            pause: called before each network call, and before pictures are decoded; what it raises leaves no grid.

        Returns:
            What :func:`fewstep.training.spread.beside` says of the samples, for the log.
        """
        if self._teacher is None:
            self._teacher = self._samples(teacher, ode_sampler(self.recording.schedule, _TEACHER_STEPS), pause)
        samples = self._samples(student, sampler, pause)
        if not self.note and path is not None:
            if self._teacher_pictures is None:
                self._teacher_pictures = self._pictures(self._teacher, pause)
            if self._teacher_pictures.dim() in (4, 5):  # images or videos; sound is not shown
                save_grid([self._teacher_pictures, self._pictures(samples, pause)], path)
        return beside(samples, self._teacher)

    @torch.no_grad()
    def _samples(self, denoiser: Denoiser, sampler: Sampler, pause: Callable[[], None]) -> Tensor:
        """x0 (N, ...) on the host, made in batches of the size that training fits."""
        pieces = []
        for first in range(0, _SHOWN, self.config.batch_size):
            indices = range(first, min(first + self.config.batch_size, _SHOWN))
            draws = Draws(self.config.seed, PREVIEWS_STEP, indices, self.device)
            conditioning = self.conditions.select([index % len(self.conditions) for index in indices])
            conditioning = self.with_default_guidance(conditioning)
            shape = self.recording.sample_shape
            x0 = draw_sample(denoiser, sampler, draws, shape, conditioning, on_step=lambda *_: pause())
            pieces.append(x0.cpu())
        return torch.cat(pieces)

    @torch.no_grad()
    def _pictures(self, samples: Tensor, pause: Callable[[], None]) -> Tensor:
        """Images or videos in [0, 1] of x0 (N, ...), decoded as many at a time as training fits."""
        pieces = []
        # The checker's word is for those who are shown pictures; here they show how the training goes.
        with without_safety_checker(self.recording.pipeline):
            for x0 in samples.split(self.config.batch_size):
                pause()
                pieces.append(self.recording.decode(x0.to(self.device)).float().cpu())
        return torch.cat(pieces)
