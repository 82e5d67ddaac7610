"""Samples of a run, the teacher's beside the student's, of the same noise and conditions: as a grid and as numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import PREVIEWS_STEP
from fewstep.diffusion.rollout import Sampler
from fewstep.training.pictures import on_white, save_grid
from fewstep.training.samples import Samples
from fewstep.training.spread import beside

_SHOWN = 8  # samples in a grid


class Previews:
    """Makes the grids of one run; the teacher's row is made once.

    Args:
        samples: makes the run's.
        wanted: whether grids were asked for.
    """

    def __init__(self, samples: Samples, *, wanted: bool = True) -> None:
        self.samples = samples
        self._teacher: list[Tensor] | None = None  # its samples, and their pictures
        self._teacher_pictures: Tensor | None = None
        why = samples.why_no_pictures() if wanted else ""
        #: Why no grid is made, though grids were asked for; else empty.
        self.note = f"no sample grids: {why}" if why else ""

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
            What :func:`fewstep.training.spread.beside` says of the samples, for the log: of several sizes of those that
            have the commonest, and nothing where that is a single one, which does not vary.
        """
        if self._teacher is None:
            self._teacher = self._x0(teacher, self.samples.teacher_sampler, pause)
        x0 = self._x0(student, sampler, pause)
        if not self.note and path is not None:
            if self._teacher_pictures is None:
                self._teacher_pictures = self._pictures(self._teacher, pause)
            if self._teacher_pictures.dim() in (4, 5):  # images or videos; sound is not shown
                save_grid([self._teacher_pictures, self._pictures(x0, pause)], path)
        commonest = max(range(len(x0)), key=lambda size: len(x0[size]))
        return beside(x0[commonest], self._teacher[commonest]) if len(x0[commonest]) > 1 else {}

    def _x0(self, denoiser: Denoiser, sampler: Sampler, pause: Callable[[], None]) -> list[Tensor]:
        """x0 (N, ...) on the host, of each size."""
        found: dict[tuple[int, ...], list[Tensor]] = {}
        for some in self.samples.batches(_SHOWN):
            x0 = self.samples.x0(denoiser, sampler, PREVIEWS_STEP, some, pause).cpu()
            found.setdefault(tuple(x0.shape[1:]), []).append(x0)
        return [torch.cat(each) for each in found.values()]

    def _pictures(self, x0: list[Tensor], pause: Callable[[], None]) -> Tensor:
        """Of samples of each size; on white where there are larger ones."""
        order = [index for some in self.samples.batches(_SHOWN) for index in some]
        made, first = [], 0
        for each in x0:
            made.append(self.samples.pictures(each, order[first : first + len(each)], pause))
            first += len(each)
        return on_white(made)
