"""The evaluator of a training: what samples are judged by while it goes on, by the metrics of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.eval.features import FashionExtractor, fashion_reference
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.diversity import diversity
from fewstep.eval.metrics.frechet import frechet
from fewstep.programs import distillation
from fewstep.training.evaluation import Asked, Evaluator


def evaluator_of(config: RunConfig, device: torch.device) -> Evaluator:
    """The evaluator of a run.

    Args:
        config: of the run.
        device: where it works.

    Raises:
        UserError: nobody here can judge samples of this teacher.
    """
    from fewstep.fashion import TEACHERS

    if config.teacher not in TEACHERS:
        raise UserError(
            f"--eval_steps judges samples of {' and '.join(TEACHERS)}, and not of {config.teacher}; leave it out, or "
            "from Python give fewstep.programs.distillation.distill an evaluator"
        )
    return FashionEvaluator(device)


def distill(teacher: str | Path | DiffusionPipeline, method: str = "dmd2", **settings: Any) -> Path:
    """Distil a teacher and export the student: the command line's ``fewstep distill`` as a function.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        method: a file name of ``fewstep.trainers``.
        **settings: fields of the method's configuration (``out`` is required), see ``fewstep distill METHOD --help``.

    Returns:
        The student's folder, a stock diffusers pipeline; with ``lora_rank`` and no ``merge`` that of its LoRA.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.training.stopping.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    return distillation.distill(teacher, method, evaluator=evaluator_of, **settings)


class FashionEvaluator:
    """Judges samples of the embedded teachers: the classifier that comes with them, and Fashion-MNIST's test images.

    The numbers are those of ``fewstep eval``, of fewer samples: a Fréchet distance of 256 is far above one of 5,000.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.best: Mapping[str, Literal["lowest", "highest"]] = {
            "fd_test": "lowest",
            "agreement": "highest",
            "diversity": "highest",
        }
        self._extractor, self._reference = FashionExtractor(device), fashion_reference()
        self.name = f"{self._extractor.name} beside {self._reference.name}"

    def teacher_samples(self) -> int:
        """None: real images are at hand."""
        return 0

    def show_teacher(self, pictures: Tensor, asked: Asked) -> None:
        """Nobody does."""
        raise NotImplementedError

    def __call__(self, pictures: Tensor, asked: Asked) -> Mapping[str, float]:
        """The Fréchet distance and, where the prompts are those of the ten classes, agreement and diversity."""
        if not self._extractor.accepts(tuple(pictures.shape[1:])):
            size = "x".join(map(str, pictures.shape[1:]))
            raise UserError(f"--eval_steps: {self._extractor.name} judges no pictures of {size}; leave it out")
        seen = self._extractor(pictures)
        numbers = {"fd_test": frechet(seen.features, self._reference)}
        labels = _classes(asked)
        if labels is not None and seen.logits is not None:
            numbers["agreement"] = agreement(seen.logits, labels)
            if len(labels) > len(labels.unique()):
                numbers["diversity"] = diversity(seen.features, labels, self._reference)
        return numbers


def _classes(asked: Asked) -> Tensor | None:
    """The classes (N,) that prompts of the embedded teachers stand for; None where some are others."""
    from fewstep.fashion import PROMPTS

    known: Sequence[str] = PROMPTS
    if not asked or any(one not in known for one in asked):
        return None
    return torch.tensor([known.index(str(one)) for one in asked])
