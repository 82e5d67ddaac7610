"""The evaluator of a training: what samples are judged by while it goes on, by the metrics of every evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.config.run import RunConfig
from fewstep.data.batch import Asked
from fewstep.data.durable import write_durably
from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.extractors.kinds import open_extractor
from fewstep.eval.features import Extractor, FashionExtractor, Reference, fashion_reference
from fewstep.eval.judge import Judge, MetricInputs, numbers_of
from fewstep.eval.metrics.table import IMAGE_METRICS, Metric
from fewstep.eval.references import reference_of
from fewstep.eval.viewers import ExtractorView, look
from fewstep.eval.weights import MissingWeightsError, Weights
from fewstep.programs import distillation
from fewstep.teachers.names import embedded_name
from fewstep.training.evaluation import Evaluator

#: Of the run's folder: the teacher's samples as DINOv2 sees them.
REFERENCE = "eval_reference.safetensors"
_SIZES = ("dino", "dino-base", "dino-small")
_OF_FASHION, _OF_DINO = ("fd_test", "agreement", "diversity"), ("prdc", "diversity")


def evaluator_of(config: RunConfig, device: torch.device) -> Evaluator:
    """The evaluator of a run: an embedded teacher's classifier beside real images, else DINOv2 beside the teacher.

    Args:
        config: of the run.
        device: where it works.

    Raises:
        UserError: the weights of DINOv2 are nowhere.
    """
    if embedded_name(config.teacher) is not None:
        rows = [row for row in IMAGE_METRICS if row.group in _OF_FASHION and row.view != "dino"]
        return PictureEvaluator(FashionExtractor(device), rows, fashion_reference())
    # Unbiased, so that a few hundred samples are enough for it: a Fréchet distance of as few is bias above all.
    kernel = next(row for row in IMAGE_METRICS if row.group == "kid")
    rows = [replace(kernel, group="kd_dino", names=("kd_dino",), view="dino")]
    rows += [row for row in IMAGE_METRICS if row.group in _OF_DINO and row.view != "fashion"]
    return PictureEvaluator(_dino(config, device), rows, None, Path(config.out) / REFERENCE, config.eval_samples)


def distill(teacher: str | Path | DiffusionPipeline, method: str = "dmd2", **settings: Any) -> Path:
    """Distil a teacher and export the student: the command line's ``fewstep distill`` as a function.

    Args:
        teacher: folder, hub id, embedded name, or a loaded pipeline.
        method: a file name of ``fewstep.trainers``, or ``auto`` for the best measured one, with settings of
            :class:`fewstep.config.run.RunConfig` alone.
        **settings: fields of the method's configuration (``out`` is required), see ``fewstep distill METHOD --help``.

    Returns:
        The student's folder, a stock diffusers pipeline; with ``lora_rank`` and no ``merge`` that of its LoRA.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.errors.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    return distillation.distill(teacher, method, evaluator=evaluator_of, **settings)


class PictureEvaluator:
    """Judges pictures by one extractor, beside a reference.

    Args:
        extractor: that looks at them.
        metrics: rows of the table of all metrics; the first gives the default number.
        reference: what they are compared with; None: the teacher's own samples, of other noise.
        kept: file of the teacher's samples as the extractor saw them, which is made once.
        count: of the teacher's samples.
    """

    def __init__(
        self,
        extractor: Extractor,
        metrics: Sequence[Metric],
        reference: Reference | None,
        kept: Path | None = None,
        count: int = 0,
    ) -> None:
        self._view, self._metrics = ExtractorView("training", extractor), metrics
        self._reference, self._kept, self._count = reference, kept, count
        beside = f"{count} samples of the teacher" if reference is None else reference.name
        self.name = f"{extractor.name} beside {beside}"
        # Students lose diversity, and hardly ever have too much of it.
        self.best: dict[str, Literal["lowest", "highest"]] = {
            name: "lowest" if row.better == "lower" else "highest" for row in metrics for name in row.names
        }

    def teacher_samples(self) -> int:
        """None where there are real images, or where they were looked at when the run began."""
        if self._reference is None and self._kept is not None and (features := self._read(self._kept)) is not None:
            self._reference = self._reference_of(features)
        return self._count if self._reference is None else 0

    def show_teacher(self, pictures: Tensor, asked: Asked) -> None:
        """Look at the teacher's samples, and keep what was seen."""
        features = self._see(pictures)["features"]
        about = {"evaluator": self.name, "sha256": self._view.extractor.sha256}
        if self._kept is not None:
            write_durably(self._kept, lambda path: save_file({"features": features.contiguous()}, path, about))
        self._reference = self._reference_of(features)

    def __call__(self, pictures: Tensor, asked: Asked) -> Mapping[str, float]:
        """The numbers of those metrics that can be made of these pictures and what they were asked for."""
        seen = self._see(pictures)
        inputs = MetricInputs(Judge(self._view.extractor, self._reference), seen.get, _conditions(asked))
        return numbers_of(self._metrics, inputs)[0]

    def _see(self, pictures: Tensor) -> dict[str, Tensor]:
        if why := self._view.refuses(pictures.shape[1:]):
            raise UserError(f"--eval_steps: {why}; leave it out")
        return look(self._view, pictures, None)

    def _reference_of(self, features: Tensor) -> Reference:
        return reference_of("the teacher's own samples", self._view.extractor, features)

    def _read(self, file: Path) -> Tensor | None:
        """What is kept of the teacher's samples; None where it is of other ones, or of another extractor."""
        try:
            with safe_open(file, "pt") as kept:
                about = kept.metadata() or {}
                same = about == {"evaluator": self.name, "sha256": self._view.extractor.sha256}
                return kept.get_tensor("features") if same else None
        except (OSError, SafetensorError):  # it is not there yet, or damaged: then it is made anew
            return None


def _dino(config: RunConfig, device: torch.device) -> Extractor:
    """The largest DINOv2 whose file is on this machine."""
    missing = None
    try:
        weights = Weights(None if config.eval_weights is None else Path(config.eval_weights))
        for size in _SIZES:
            try:
                return open_extractor(size, weights, device)
            except MissingWeightsError as error:
                missing = missing or error
        assert missing is not None  # as no size is there
        raise missing
    except UserError as error:
        told = str(error).replace("--weights", "--eval_weights")
        raise UserError(f"--eval_steps: {told}; or leave it out") from error


def _conditions(asked: Asked) -> SampleConditions:
    """What samples were asked for, one value each; the classes that it stands for where they are known."""
    from fewstep.fashion import PROMPTS

    if not asked:
        return SampleConditions()
    if isinstance(asked[0], str):
        known = all(one in PROMPTS for one in asked)
        return SampleConditions("prompt", tuple(asked), tuple(PROMPTS.index(str(p)) for p in asked) if known else ())
    return SampleConditions("label", tuple(asked), tuple(int(one) for one in asked))
