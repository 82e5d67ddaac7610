"""What an evaluation compares with, as it was asked for: chosen before anything is made, and made when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.data.durable import file_sha256, json_sha256
from fewstep.data.images import read_images
from fewstep.errors import UserError
from fewstep.eval.config import EvalConfig
from fewstep.eval.features import fashion_reference
from fewstep.eval.judge import Judge
from fewstep.eval.panel import Panel
from fewstep.eval.references import floors_of_halves, judge_of_statistics, judges_of
from fewstep.eval.samples import SampleSet
from fewstep.eval.sources import ImageSource, ModelSource, reference_seed
from fewstep.fashion.files import REFERENCE, manifest

Kind = Literal["given", "fashion", "teacher", "images", "statistics", "none"]


@dataclass
class Comparison:
    """What samples are compared with.

    Attributes:
        kind: of the reference.
        config: of the evaluation.
        given: extractor and reference that the caller made.
        floors: what samples of the reference's own kind score, by the number's name; of a teacher that is its own row.
        floor_of: what those are, in words.
        own_steps: of the teacher whose own samples are the reference.
        identity: tells the reference from others that are called the same; JSON can hold it.
    """

    kind: Kind
    config: EvalConfig
    given: Judge | None = None
    floors: dict[str, float] = field(default_factory=dict)
    floor_of: str = ""
    own_steps: int | None = None
    identity: dict[str, Any] | None = None

    @property
    def unfit(self) -> Mapping[str, str]:
        """Groups of metrics that mean nothing beside this reference, and why."""
        if self.kind in ("given", "fashion"):
            return {"fd": "the reference is that of fd_test"}
        return {"fd_test": "it is the distance to Fashion-MNIST's test images; to another reference it is called fd"}

    def judges(
        self,
        panel: Panel,
        shape: Sequence[int],
        of_teacher: Callable[[int], tuple[ModelSource, SampleSet]],
        of_images: Callable[[ImageSource], SampleSet],
    ) -> dict[str, Judge]:
        """A judge for every kind of extractor that this reference can be seen by.

        Args:
            panel: who judges.
            shape: ([F,] C, H, W) of the samples.
            of_teacher: makes the teacher's own samples of a base seed.
            of_images: likewise the samples of a set of images.
        """
        extractors = list(panel.extractors.items())
        judges = {kind: Judge(extractor, None) for kind, extractor in extractors}
        if self.kind == "given" and self.given is not None:
            judges["fashion"] = self.given
        elif self.kind == "fashion" and "fashion" in panel.extractors:
            judges["fashion"] = Judge(panel.extractors["fashion"], fashion_reference())
            self.identity = {"kind": self.kind, "sha256": manifest()["files"][REFERENCE]["sha256"]}
        elif self.kind == "teacher":
            source, samples = of_teacher(reference_seed(self.config.seed))
            name = f"{samples.source.num:,} samples of the {source.title} with other seeds"
            judges |= judges_of(name, samples, extractors, source.conditions)
            self.own_steps = source.steps
            self.identity = {"kind": self.kind, "of": source.model.source, "call": source.call}
            self.identity["sha256"] = json_sha256(source.content)
            self.floor_of = f"the {source.title} against itself with other seeds"
        elif self.kind == "images":
            if len(shape) == 4:
                raise UserError(
                    "samples that are videos cannot be compared with a folder of images; give --reference teacher"
                )
            samples = of_images(ImageSource(self.config.reference, tuple(shape), self.config.reference_crop))
            name = f"the {samples.source.num:,} images of {self.config.reference}"
            self.identity = {"kind": self.kind, "sha256": json_sha256(samples.source.content)}
            judges |= judges_of(name, samples, extractors, None)
            self.floor_of = "one half of the reference's images against the other"
            for kind, judge in judges.items():
                self.floors |= floors_of_halves([m for m in panel.metrics if panel.kind_of(m) == kind], judge)
        elif self.kind == "statistics":
            judges |= judge_of_statistics(Path(self.config.reference), panel.extractors)
            self.identity = {"kind": self.kind, "sha256": file_sha256(Path(self.config.reference))}
        if self.config.train_data is not None and panel.principal in judges:
            training = of_images(ImageSource(self.config.train_data, tuple(shape), True, "training"))
            features = training.column(panel.principal, "features")
            judges[panel.principal].training = None if features is None else features.flatten(0, -2)
        return judges


def compare_with(config: EvalConfig, judge: Judge | None, *, known_clothes: bool) -> Comparison:
    """What ``config.reference`` means.

    Args:
        config: of the evaluation.
        judge: that the caller made, if any.
        known_clothes: the samples are asked for as Fashion-MNIST's classes.

    Raises:
        UserError: it is neither a word, nor a folder, nor a file of statistics.
    """
    kind: Kind
    if config.train_data is not None:
        read_images(config.train_data)  # what is not there is said before anything is made
    if config.reference == "auto":
        if judge is not None:
            kind = "given"
        else:
            kind = "fashion" if known_clothes else "teacher" if config.teacher is not None else "none"
    elif config.reference == "fashion":
        kind = "fashion"
    elif config.reference == "teacher":
        kind = "teacher"
    elif config.reference == "none":
        kind = "none"
    elif Path(config.reference).suffix == ".npz":
        kind = "statistics"
    elif Path(config.reference).is_dir():
        kind = "images"
        read_images(config.reference)
    else:
        raise UserError(f"reference {config.reference} is neither a folder of images nor a file of statistics (.npz)")
    return Comparison(kind, config, judge)


def covers(judge: Judge, labels: set[int]) -> bool:
    """Whether samples of these classes cover all that the reference has."""
    if judge.reference is None:
        return True
    return judge.reference.labels is None or len(labels) >= len(torch.unique(judge.reference.labels))
