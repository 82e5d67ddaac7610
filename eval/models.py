"""The models an evaluation compares: a student's folder with its card, a teacher's folder or embedded name."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.errors import UserError

from .generate import condition_kind

CARD_NAME = "fewstep.json"


@dataclass
class Model:
    """A pipeline and the call that samples it right.

    call: keyword arguments without the condition; ``num_inference_steps`` is set by the evaluation.
    steps: the largest step count it was made for, None where any will do (teachers).
    counts: the step counts known to hold, None where unknown. kind: "prompt", "label" or None, read from the
    pipeline when not given ("infer"). source: folder or hub id it is loaded from; pipeline: the loaded object. One of
    the two must be there; rows of a model without a source are not kept for resuming, as nothing identifies it.
    """

    name: str
    role: Literal["teacher", "student"]
    call: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    pipeline: Any = None
    steps: int | None = None
    counts: frozenset[int] | None = None
    kind: Literal["prompt", "label", "infer"] | None = "infer"
    base_model: str | None = None

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline, loaded with stock diffusers; a pipeline given as an object is returned where it is.

        Raises UserError when diffusers cannot load the folder.
        """
        if self.pipeline is not None:
            return self.pipeline
        # Inside: importing the pipeline classes takes seconds that `fewstep --help` should not pay.
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(self.source, torch_dtype=dtype)
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"diffusers cannot load {self.source}: {_first_line(error)}") from error
        return pipeline.to(device)

    def pipeline_class(self) -> type:
        """The class of its pipeline, without loading any weights. Raises UserError when diffusers does not have it."""
        if self.pipeline is not None:
            return type(self.pipeline)
        import diffusers

        try:
            name = diffusers.DiffusionPipeline.load_config(self.source)["_class_name"]
        except (OSError, ValueError) as error:
            raise UserError(f"diffusers cannot read {self.source}: {_first_line(error)}") from error
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
        if found is None:
            raise UserError(f"{self.source} holds a {name}, which this diffusers does not have")
        return found

    def condition_kind(self) -> Literal["prompt", "label"] | None:
        """How it is conditioned: as its card says, else read from its pipeline's class. Raises as `pipeline_class`."""
        return condition_kind(self.pipeline_class()) if self.kind == "infer" else self.kind

    def guidance_note(self) -> str | None:
        """One sentence when nobody stated the guidance it is run at, so that its pipeline's default decides."""
        parameter = inspect.signature(self.pipeline_class().__call__).parameters.get("guidance_scale")
        if parameter is None or "guidance_scale" in self.call:
            return None
        return f"{self.name} ran at its pipeline's default guidance_scale, {parameter.default}: its call states none."

    def why_not(self, steps: int) -> str | None:
        """One sentence saying why the model is not run at `steps`, or None when it can be."""
        if self.steps is not None and steps > self.steps:
            return f"{self.name} is not run at {steps} steps: it was trained for {self.steps}."
        if self.counts is not None and steps not in self.counts:
            return f"{self.name} is not run at {steps} steps: its {CARD_NAME} says that this count does not hold."
        return None

    def fingerprint(self) -> str | None:
        """A hash of what the model is loaded from, or None when only the loaded object is known."""
        if self.source is None:
            return None
        folder = Path(self.source)
        digest = hashlib.sha256(self.source.encode())
        # The card's text and its pictures may be rewritten with the results of this evaluation: they do not count.
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".md", ".png")):
            state = path.stat()
            digest.update(f"{path.relative_to(folder)}:{state.st_size}:".encode())
            # Large weights are told apart by their time of writing; reading them would take minutes.
            digest.update(path.read_bytes() if state.st_size < 2**26 else str(state.st_mtime_ns).encode())
        return digest.hexdigest()


def student_model(path: str | Path, name: str = "student") -> Model:
    """A student's folder (or the run folder that holds it as ``student/``) as a `Model`.

    Raises UserError with one line.
    """
    folder = _pipeline_folder(Path(path))
    card = read_card(folder)
    call = dict(card["call"])
    call.pop("num_inference_steps", None)
    return Model(
        name=name,
        role="student",
        call=call,
        source=str(folder),
        steps=int(card["steps"]),
        counts=_holding(card.get("counts")),
        kind=card.get("conditional", "infer"),
        base_model=card.get("base_model"),
    )


def teacher_model(teacher: str | Path, call: Mapping[str, Any] | None = None) -> Model:
    """A teacher as a `Model`: an embedded name, a pipeline folder, or a hub id; `call` overrides its arguments.

    An embedded teacher brings its stated guidance; any other one runs with its pipeline's defaults where `call` says
    nothing. Raises UserError with one line, as `student_model`.
    """
    from fewstep import fashion
    from fewstep.teacher import teacher_folder

    text = str(teacher)
    arguments = dict(call or {})
    arguments.pop("num_inference_steps", None)
    for name, stated in fashion.TEACHERS.items():
        folder = Path(fashion.teacher_path(name))
        if text == name or Path(text).resolve() == folder.resolve():
            arguments = {"guidance_scale": stated.guidance_scale} | arguments
            source = str(_pipeline_folder(folder))
            return Model(f"teacher {name}", "teacher", arguments, source=source, base_model=name)
    found = teacher_folder(text)
    source = text if found is None else str(_pipeline_folder(found))
    return Model("teacher", "teacher", arguments, source=source, base_model=text)


def read_card(folder: Path) -> dict[str, Any]:
    """The student's ``fewstep.json``. Raises UserError when it is missing, unreadable or incomplete."""
    path = folder / CARD_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {CARD_NAME}: it is no student of fewstep (a teacher goes with --teacher)")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {_first_line(error)}") from error
    missing = [key for key in ("steps", "call") if key not in card] if isinstance(card, dict) else ["steps", "call"]
    if missing:
        raise UserError(f"{path} lacks {' and '.join(missing)}")
    return card


def is_embedded(name: str | None) -> bool:
    """Whether `name` (a name or a path) is one of the embedded Fashion-MNIST teachers."""
    from fewstep import fashion

    return name is not None and Path(name).name in fashion.TEACHERS


def _pipeline_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    if (path / "model_index.json").is_file():
        return path
    if (path / "student" / "model_index.json").is_file():
        return path / "student"
    raise UserError(f"{path} is not a diffusers pipeline: it has no model_index.json")


def _holding(counts: Any) -> frozenset[int] | None:
    """The step counts that hold, from the card's list of them or its map from count to verdict."""
    if counts is None:
        return None
    if isinstance(counts, Mapping):
        return frozenset(int(count) for count, holds in counts.items() if holds is True)
    return frozenset(int(count) for count in counts)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
