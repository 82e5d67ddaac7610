"""The models an evaluation compares: a student's folder with its card, a teacher's folder or embedded name."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.errors import UserError, first_line
from fewstep.recording.call.invocation import condition_kind

CARD_NAME = "fewstep.json"


@dataclass
class Model:
    """A pipeline and the call that samples it right.

    call: keyword arguments without the condition; ``num_inference_steps`` is set by the evaluation.
    steps: the largest step count it was made for, None where any will do (teachers).
    counts: the step counts known to hold, None where unknown. kind: "prompt", "label", "item" or None, read from the
    pipeline when not given ("infer"). source: folder or hub id it is loaded from, and base that of the model below it
    where it is a LoRA; pipeline: the loaded object. A source or a pipeline must be there; rows of a model without a
    source are not kept for resuming, as nothing identifies it.
    files: the revision, subfolder and variant of its files, or of its base's, where they were told; of_teacher: those
    of the teacher that a student was distilled from.
    base_model: the teacher that it is or was distilled from: an embedded name, a folder or a hub id.
    training: the settings it was distilled with, where its card tells them.
    """

    name: str
    role: Literal["teacher", "student"]
    call: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    base: str | None = None
    pipeline: Any = None
    steps: int | None = None
    counts: frozenset[int] | None = None
    kind: Literal["prompt", "label", "item", "infer"] | None = "infer"
    files: dict[str, str] = field(default_factory=dict)
    of_teacher: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline, loaded with stock diffusers; a pipeline given as an object is returned where it is.

        Raises UserError when diffusers cannot load the folder, or its files do not hold the weights of its networks.
        """
        if self.pipeline is not None:
            return self.pipeline
        # Inside: importing the pipeline classes takes seconds that `fewstep --help` should not pay.
        from fewstep.export.load import load
        from fewstep.export.own_code import is_own_code
        from fewstep.teachers.single_file import load_single_file
        from fewstep.teachers.weights import load_pipeline

        place = self._place()
        if self.base is not None:
            return load(place, base=self.base, dtype=dtype).to(device)
        found = self._files()
        if found.is_file:
            return load_single_file(Path(found.place), dtype=dtype).to(device)
        try:
            own = {"trust_remote_code": True} if is_own_code(place) else {}
            pipeline = load_pipeline(found.place, dtype=dtype, **found.words, **own)
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"diffusers cannot load {place}: {first_line(error)}") from error
        return pipeline.to(device)

    def _files(self, *, weights: bool = True) -> Any:
        """The `fewstep.teachers.source.Source` of its pipeline, or of its base's where it is a LoRA."""
        from fewstep.teachers.source import find_source

        return find_source(self.base or self._place(), **self.files, flag="the pipeline", weights=weights)

    def pipeline_class(self) -> type:
        """The class of its pipeline, without loading any weights. Raises UserError when diffusers does not have it."""
        if self.pipeline is not None:
            return type(self.pipeline)
        import diffusers

        from fewstep.export.own_code import stock_class_of
        from fewstep.teachers.single_file import index_of

        place, files = self.base or self._place(), self._files(weights=False)
        try:
            name = index_of(files)["_class_name"]
        except (OSError, ValueError) as error:
            raise UserError(f"diffusers cannot read {place}: {first_line(error)}") from error
        found: type | None = getattr(diffusers, name, None) if isinstance(name, str) else stock_class_of(self._place())
        if found is None:
            raise UserError(f"{place} holds a {name}, which this diffusers does not have")
        return found

    def _place(self) -> str:
        """The folder or hub id that it is loaded from."""
        if self.source is None:
            raise UserError(f"{self.name} has neither a source nor a pipeline")
        return self.source

    def condition_kind(self) -> Literal["prompt", "label", "item"] | None:
        """How it is conditioned: as its card says, else read from its pipeline's class. Raises as `pipeline_class`."""
        return condition_kind(self.pipeline_class()) if self.kind == "infer" else self.kind

    @property
    def embedded(self) -> str | None:
        """The embedded teacher that it is or was distilled from; None for any other, whatever its folder is called."""
        from fewstep.teachers.names import embedded_name

        return None if self.base_model is None else embedded_name(self.base_model)

    def guidance_note(self) -> str | None:
        """One sentence when nobody stated the guidance it is run at, so that its pipeline's default decides."""
        parameter = inspect.signature(self.pipeline_class().__call__).parameters.get("guidance_scale")
        if parameter is None or "guidance_scale" in self.call:
            return None
        return f"{self.name} ran at its pipeline's default guidance_scale, {parameter.default}: its call states none."

    def why_not(self, steps: int) -> str | None:
        """One sentence saying why the model is not run at `steps`, or None when it can be."""
        if self.steps is not None and steps > self.steps:
            return f"{self.name} is not run at {in_steps(steps)}: it was trained for {self.steps}."
        if self.counts is not None and steps not in self.counts:
            return f"{self.name} is not run at {in_steps(steps)}: its {CARD_NAME} says that this count does not hold."
        return None

    def fingerprint(self) -> str | None:
        """A hash of the files that the model is loaded from, or None where it has none: a loaded object, a hub id."""
        if self.source is None or not all(Path(source).is_dir() for source in filter(None, (self.source, self.base))):
            return None
        digest = hashlib.sha256()
        for source in filter(None, (self.source, self.base)):
            digest.update(source.encode())
            # The card's text and its pictures may be rewritten with the results of this evaluation: they do not count.
            files = (path for path in Path(source).rglob("*") if path.is_file() and path.suffix not in (".md", ".png"))
            for path in sorted(files):
                state = path.stat()
                digest.update(f"{path.relative_to(source)}:{state.st_size}:".encode())
                # Large weights are told apart by their time of writing; reading them would take minutes.
                digest.update(path.read_bytes() if state.st_size < 2**26 else str(state.st_mtime_ns).encode())
        return digest.hexdigest()


def in_steps(count: int) -> str:
    """ "1 step", "4 steps"."""
    return f"{count} step" if count == 1 else f"{count} steps"


def student_model(student: str | Path | Any, name: str = "student", base: str | None = None) -> Model:
    """A student as a `Model`: its folder, the run folder that holds it as ``student/``, a hub id, or `fewstep.load`'s.

    base: where the base model of a LoRA lies, if it is not found by itself (see `fewstep.export.load.base_of`).

    Raises UserError with one line when there is no such student, or no base.
    """
    # Inside: they import diffusers.
    from fewstep.export.about import read_about
    from fewstep.export.load import base_of, teacher_of, told_of_base

    about = getattr(student, "fewstep", None)
    source = below = None
    files: dict[str, str] = {}
    teacher = (about or {}).get("base_model")
    if about is None:
        if not isinstance(student, str | Path):
            raise UserError(f"a {type(student).__name__} is no student: give a folder, or what fewstep.load gives")
        path = Path(student)
        forms = (path / form for form in ("student", "student_lora"))
        source = str(next((form for form in forms if (form / CARD_NAME).is_file()), student))
        about = read_about(source)
        if "lora" in about:
            below, files = base_of(source, about, base), told_of_base(source, about, base)
        teacher = teacher_of(source, about)
    if not isinstance(about.get("steps"), int):
        raise UserError(f"{CARD_NAME} of {student} does not say how many steps it takes; export the student again")
    counts = about.get("counts")
    if counts is not None and not isinstance(counts, list):
        raise UserError(f"{CARD_NAME} of {student} is damaged (counts is no list); export the student again")
    return Model(
        name=name,
        role="student",
        call=_without_steps(about["call"]),
        source=source,
        base=below,
        pipeline=student if source is None else None,
        steps=about["steps"],
        counts=None if counts is None else frozenset(counts),
        kind=about.get("conditional", "infer"),
        files=files,
        of_teacher={name: value for name, value in about.get("base_files", {}).items() if name != "file"},
        base_model=teacher,
        training=about.get("training") or {},
    )


def teacher_model(
    teacher: str | Path,
    call: Mapping[str, Any] | None = None,
    students: Sequence[Model] = (),
    files: Mapping[str, str] | None = None,
) -> Model:
    """A teacher as a `Model`: an embedded name, a folder, a single file, or a hub id; `call` overrides its arguments.

    files: revision, subfolder and variant, where they are told; else those that one of `students` was distilled from.
    What `call` leaves open: an embedded teacher runs at its stated guidance; the teacher of one of `students` as it
    was distilled from; any other one with its pipeline's defaults. Raises UserError with one line when there is none.
    """
    from fewstep import fashion
    from fewstep.teachers.names import embedded_name, same_teacher
    from fewstep.teachers.source import find_source

    text = str(teacher)
    given = _without_steps(call or {})
    if (name := embedded_name(text)) is not None:
        if files:
            raise UserError(f"{name} is embedded, and has one set of files; leave out {', '.join(files)}")
        arguments = {"guidance_scale": fashion.TEACHERS[name].guidance_scale} | given
        folder = str(fashion.teacher_path(name))
        return Model(f"teacher {name}", "teacher", arguments, source=folder, base_model=name)
    theirs = next((s for s in students if s.base_model is not None and same_teacher(s.base_model, text)), None)
    trained, told = (theirs.training, theirs.of_teacher) if theirs is not None else ({}, {})
    files = dict(files or told)
    find_source(text, **files, flag="the teacher", weights=False)
    arguments = _without_steps(trained.get("call") or {})
    arguments |= {key: trained[key] for key in ("guidance_scale", "negative_prompt") if trained.get(key) is not None}
    return Model("teacher", "teacher", arguments | given, source=text, files=files, base_model=text)


def _without_steps(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose step count is left to the evaluation."""
    return {key: value for key, value in call.items() if key != "num_inference_steps"}
