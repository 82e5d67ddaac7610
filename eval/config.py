"""What an evaluation measures, checked when it is made."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.config.values import refuse_misfits
from fewstep.data.conditions import read_classes, read_prompts
from fewstep.errors import UserError
from fewstep.eval.exporters import EXPORTERS
from fewstep.eval.metrics.table import METRICS
from fewstep.eval.scorers.clip_score import BACKBONES

# Rows of fewer samples serve for a look: the Fréchet distance falls with their number.
QUOTABLE = 5000
#: References that are called by a word; any other is a folder of images, or a file of statistics.
REFERENCES = ("auto", "teacher", "fashion", "none")
#: clean-fid's names of the ways to 299 x 299 pixels.
FID_MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")
IMAGES = ("all", "shown")


@dataclass
class EvalConfig:
    """What `evaluate` measures.

    teacher: embedded name, folder, single file or hub id; None leaves the teacher's rows out. revision, subfolder,
    variant: which of its files; default those that the students were distilled from. base: where the base model of
    LoRA students lies, if it is not found by itself. teacher_call: further arguments of the teacher's pipeline
    (guidance_scale, ...). measure_teacher: False takes the rows of an
    embedded teacher that ship with the package, where they fit. teacher_steps: None takes its own count, and those of
    the students. steps: the students'
    step counts; None takes those that their cards name. num: samples in every row. prompts, classes or items (a file,
    or such as 0-9, or a list; items: a prompt with the pictures of the pipeline's call, as of a run): what sample i
    is asked for (entry i modulo their number); None takes the ten of Fashion-MNIST for its models. unconditional: the
    models take neither, which is checked.
    metrics: None takes all that there are for these models. reference: "teacher" (its own samples with other seeds),
    "fashion" (Fashion-MNIST's test split), "none", a folder of images or a file of statistics (.npz); "auto" takes
    fashion for its models, else the teacher where there is one. reference_crop: fit the images of a folder to the
    samples' size (centre crop, Lanczos) instead of refusing another one. train_data: the images that the teacher
    learnt from, as --data takes them, for the memorisation. weights: folder of the metrics' networks.
    weights_sha256: the hashes of files that were published without one. strict: a metric that cannot be computed
    stops the evaluation. fid_mode: how images become 299 pixels wide. clip_model: the network of the CLIP score; None
    takes the first whose weights are there.
    images: "all" samples are kept as PNG files, or those "shown". export: benchmarks in whose layout each row's samples
    are written, too; export_prompts: the file of the benchmark's own prompts, where it has one. columns: samples that
    are shown in the grid.
    latency_budget: seconds after which no further round of timed calls starts. device: None takes the GPU when there
    is one.
    """

    out: Path = Path("eval")
    teacher: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    base: str | None = None
    teacher_steps: Sequence[int] | None = None
    teacher_call: dict[str, Any] | None = None
    measure_teacher: bool = True
    steps: Sequence[int] | None = None
    num: int = QUOTABLE
    seed: int = 0
    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None
    items: str | Path | Sequence[Mapping[str, Any]] | None = None
    unconditional: bool = False
    batch_size: int = 100
    metrics: Sequence[str] | None = None
    reference: str = "auto"
    reference_crop: bool = False
    train_data: str | None = None
    weights: Path | None = None
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False
    fid_mode: str = "clean"
    clip_model: str | None = None
    images: str = "all"
    export: Sequence[str] = ()
    export_prompts: str | None = None
    columns: int = 10
    latency_calls: int = 20
    latency_budget: float = 60.0
    device: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.weights = None if self.weights is None else Path(self.weights)
        prompts: Any = self.prompts  # a text is a sequence of texts, too, and never meant as one
        self.prompts = read_prompts(prompts) if isinstance(prompts, str | Path) else prompts
        classes: Any = self.classes
        self.classes = read_classes(classes) if isinstance(classes, str) else classes
        refuse_misfits(self)
        for name in ("num", "batch_size", "columns", "latency_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for count in [*(self.steps or ()), *(self.teacher_steps or ())]:
            if count < 1:
                raise UserError(f"a step count must be at least 1, not {count}")
        unknown = sorted(set(self.metrics or ()) - set(METRICS))
        if unknown:
            raise UserError(f"metrics has the unknown {', '.join(unknown)}; there are {', '.join(METRICS)}")
        told = [name for name in ("prompts", "classes", "items") if getattr(self, name) is not None]
        if len(told) + self.unconditional > 1:
            raise UserError("samples are asked for by prompts, by classes, by items or by nothing: give one of them")
        unknown = sorted(set(self.export) - set(EXPORTERS))
        if unknown:
            raise UserError(f"there is no export {', '.join(unknown)}; there are {', '.join(EXPORTERS)}")
        if self.export and self.images != "all":
            raise UserError("an export needs all images: leave out --images shown")
        if self.metrics is not None and not self.metrics:
            raise UserError(f"metrics is empty; name some of {', '.join(METRICS)}, or leave it out")
        backbones = (None, *(one.name for one in BACKBONES))
        for name, known in (("fid_mode", FID_MODES), ("images", IMAGES), ("clip_model", backbones)):
            if getattr(self, name) not in known:
                words = ", ".join(str(one) for one in known if one is not None)
                raise UserError(f"{name} must be one of {words}, not {getattr(self, name)}")
        if self.reference not in REFERENCES and not Path(self.reference).exists():
            words = ", ".join(REFERENCES)
            raise UserError(f"reference {self.reference} does not exist: give {words}, a folder of images, or an .npz")
        if self.reference == "teacher" and self.teacher is None:
            raise UserError("reference teacher needs the teacher: give it, or another reference")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UserError(f"unknown dtype {self.dtype}")

    @property
    def teacher_files(self) -> dict[str, str]:
        """What of the teacher's files is told."""
        told = {"revision": self.revision, "subfolder": self.subfolder, "variant": self.variant}
        return {name: value for name, value in told.items() if value is not None}

    @property
    def torch_device(self) -> torch.device:
        """The device models are loaded on."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def with_options(cls, config: "EvalConfig | None", options: Mapping[str, Any]) -> "EvalConfig":
        """A configuration with some of its fields changed. Raises UserError where one of them does not exist."""
        if unknown := sorted(set(options) - {item.name for item in dataclasses.fields(cls)}):
            raise UserError(f"unknown option {', '.join(unknown)}")
        return dataclasses.replace(config or cls(), **options)
