"""Evaluation during training: a small set of the student's samples, the same noise every time, judged by an evaluator.

Whoever knows what a good picture is stands above this room, and hands its evaluator in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.data.batch import Asked
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import EVALUATION_STEP, REFERENCE_STEP
from fewstep.diffusion.rollout import Sampler
from fewstep.errors import UserError
from fewstep.training.best import Measure
from fewstep.training.distributed import Processes, host_group
from fewstep.training.pictures import in_size, to_uint8
from fewstep.training.samples import Samples


class Evaluator(Protocol):
    """Makes numbers of pictures. It lives on the main process alone."""

    @property
    def name(self) -> str:
        """Of what the numbers depend on; numbers of evaluators of different names are not compared."""
        ...

    @property
    def best(self) -> Mapping[str, Literal["lowest", "highest"]]:
        """Which of its values is the best, for each number by its name; the first number is the default one."""
        ...

    def teacher_samples(self) -> int:
        """How many of the teacher's samples it has to be shown before the first evaluation; 0 for none."""
        ...

    def show_teacher(self, pictures: Tensor, asked: Asked) -> None:
        """Look at the teacher's samples, of other noise than the student's: uint8 (N, [F,] C, H, W)."""
        ...

    def __call__(self, pictures: Tensor, asked: Asked) -> Mapping[str, float]:
        """The numbers of the student's samples: uint8 (N, [F,] C, H, W); those of ``best`` that can be made of them.

        Raises:
            UserError: these pictures cannot be judged.
        """
        ...


#: Makes the evaluator of a run; it raises :class:`UserError` where there is none.
MakeEvaluator = Callable[[RunConfig, torch.device], Evaluator]


class Evaluation:
    """The evaluations of one run; what they answer is the same on all processes, which share the sampling.

    Args:
        config: of the run.
        make: makes the evaluator.
        device: where it works.
        processes: this process among all.

    Attributes:
        measure: the number that says which evaluation is the best.

    Raises:
        UserError: there is no evaluator of this run, or it does not give the number that is asked for.
    """

    def __init__(
        self, config: RunConfig, make: MakeEvaluator | None, device: torch.device, processes: Processes
    ) -> None:
        self.config, self.processes = config, processes
        self._evaluator: Evaluator | None = None
        self._group = host_group() if processes.count > 1 else None
        self.measure = processes.of_main(lambda: self._open(make, device))

    def begin(self, samples: Samples, teacher: Denoiser) -> None:
        """Show the evaluator what it wants to see of the teacher.

        Args:
            samples: makes those of the run.
            teacher: under its guidance.

        Raises:
            UserError: no pictures can be made, or they cannot be judged.
        """
        if why := samples.why_no_pictures():
            raise UserError(f"--eval_steps needs pictures of samples: {why}")
        count = self.processes.of_main(lambda: self._evaluator_here.teacher_samples())
        if count:
            pictures = self._pictures(samples, teacher, samples.teacher_sampler, REFERENCE_STEP, count)
            self.processes.of_main(lambda: self._show(pictures, samples.asked(count)))

    def numbers(
        self, samples: Samples, student: Denoiser, sampler: Sampler, pause: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """For the log: ``eval/<name>`` and its number. All are not-a-number where a sample is not finite.

        Args:
            samples: makes those of the run.
            student: as it will be exported.
            sampler: how it moves.
            pause: called before each network call, and before pictures are decoded, equally often on all processes.
        """
        count = self.config.eval_samples
        pictures = self._pictures(samples, student, sampler, EVALUATION_STEP, count, pause)

        def judged() -> dict[str, float]:
            evaluator = self._evaluator_here
            if pictures is None:
                return dict.fromkeys(evaluator.best, math.nan)
            found = evaluator(pictures, samples.asked(count))
            if self.measure.metric not in found:
                raise UserError(f"--eval_metric {self.measure.metric}: of these samples there are {', '.join(found)}")
            return {name: float(found[name]) for name in evaluator.best if name in found}

        return {f"eval/{name}": number for name, number in self.processes.of_main(judged).items()}

    @property
    def _evaluator_here(self) -> Evaluator:
        assert self._evaluator is not None  # who asks is the main process
        return self._evaluator

    def _show(self, pictures: Tensor | None, asked: Asked) -> None:
        if pictures is None:
            raise UserError("--eval_steps: the teacher's own samples are not finite; leave it out")
        self._evaluator_here.show_teacher(pictures, asked)

    def _open(self, make: MakeEvaluator | None, device: torch.device) -> Measure:
        if make is None:
            raise UserError("--eval_steps: nobody here can judge samples; hand in an evaluator, or leave it out")
        self._evaluator = one = make(self.config, device)
        metric = self.config.eval_metric or next(iter(one.best))
        if metric not in one.best:
            raise UserError(f"--eval_metric {metric}: of these samples there are {', '.join(one.best)}")
        return Measure(metric, one.best[metric] == "highest", self.config.eval_samples, one.name)

    def _pictures(
        self,
        samples: Samples,
        denoiser: Denoiser,
        sampler: Sampler,
        step: int,
        count: int,
        pause: Callable[[], None] = lambda: None,
    ) -> Tensor | None:
        """uint8 (N, [F,] C, H, W) on the main process; None there where a sample is not finite.

        Pictures of other sizes are brought to that of the first.
        """
        batches, parts = samples.batches(count), self.processes.count
        size = samples.picture_size()
        made: list[Tensor] = []
        finite = True
        for first in range(0, len(batches), parts):
            # Of the last few batches there may be none for this process: then it makes one again, as divided networks
            # are called by all processes at once.
            mine = batches[min(first + self.processes.rank, len(batches) - 1)]
            x0 = samples.x0(denoiser, sampler, step, mine, pause)
            finite = finite and bool(x0.isfinite().all())
            pictures = to_uint8(in_size(samples.pictures(x0.nan_to_num(), mine, pause), size))
            if pictures.dim() == 5:
                pictures = pictures.movedim(2, 1)
            elif pictures.dim() != 4:
                raise UserError("--eval_steps needs pictures, and this teacher makes none; leave it out")
            made += self._gathered(pictures, [len(batch) for batch in batches[first : first + parts]])
        if self.processes.first(None if finite else True):
            return None
        order = torch.tensor([index for batch in batches for index in batch]).argsort()
        return torch.cat(made)[order] if made else None

    def _gathered(self, pictures: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """On the main process the pictures of all, in order; nothing on the others."""
        if self._group is None:
            return [pictures]
        full = torch.zeros(max(lengths), *pictures.shape[1:], dtype=torch.uint8)
        full[: len(pictures)] = pictures
        main = self.processes.rank == 0
        theirs = [torch.empty_like(full) for _ in range(self.processes.count)] if main else None
        dist.gather(full, theirs, group=self._group)
        return [one[:length] for one, length in zip(theirs or [], lengths, strict=False)]
