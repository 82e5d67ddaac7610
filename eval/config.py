"""What an evaluation measures, checked when it is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.config.values import refuse_misfits
from fewstep.errors import UserError
from fewstep.eval.metrics.table import IMAGE_METRICS

#: All that can be measured: the numbers of the image metrics, and the clock's.
METRICS = (*(name for metric in IMAGE_METRICS for name in metric.names), "speed")
# Rows of fewer samples serve for a look: the Fréchet distance falls with their number.
QUOTABLE = 5000


@dataclass
class EvalConfig:
    """What `evaluate` measures.

    teacher: embedded name, folder, single file or hub id; None leaves the teacher's rows out. revision, subfolder,
    variant: which of its files; default those that the students were distilled from. base: where the base model of
    LoRA students lies, if it is not found by itself. teacher_call: further arguments of the teacher's pipeline
    (guidance_scale, ...). steps: the students' step counts. num: samples in every row. prompts or classes:
    what sample i is asked for (entry i modulo their number); None takes the ten of Fashion-MNIST for its models.
    reference: "auto" (Fashion-MNIST's test split where a model or its prompts come from there), "fashion" or "none".
    columns: samples shown in the grid. latency_budget: seconds after which no further timed call starts.
    device: None takes the GPU when there is one.
    """

    out: Path = Path("eval")
    teacher: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    base: str | None = None
    teacher_steps: Sequence[int] = (1, 4, 25)
    teacher_call: dict[str, Any] | None = None
    steps: Sequence[int] = (1, 2, 4)
    num: int = QUOTABLE
    seed: int = 0
    prompts: Sequence[str] | None = None
    classes: Sequence[int] | None = None
    batch_size: int = 100
    metrics: Sequence[str] = METRICS
    reference: str = "auto"
    columns: int = 10
    latency_calls: int = 20
    latency_budget: float = 60.0
    device: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        refuse_misfits(self)
        for name in ("num", "batch_size", "columns", "latency_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for count in [*self.steps, *self.teacher_steps]:
            if count < 1:
                raise UserError(f"a step count must be at least 1, not {count}")
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown:
            raise UserError(f"unknown metric {', '.join(unknown)}; there are {', '.join(METRICS)}")
        if self.reference not in ("auto", "fashion", "none"):
            raise UserError(f"reference must be auto, fashion or none, not {self.reference}")
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
