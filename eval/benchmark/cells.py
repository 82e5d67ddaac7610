"""The cells of the table of all methods: which student or teacher, at how many steps, and what its numbers depend on.

``methods.yaml`` beside this file lists the trainings. A training is a shipped recipe for an embedded teacher with some
settings changed; a cell is its student at one step count, for one seed, or a teacher at one step count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.fashion import TEACHERS, looking
from fewstep.fashion.files import CLASSIFIER, HELD_BACK_IMAGES, REFERENCE, TRAINING_IMAGES, manifest
from fewstep.programs.methods import method_class

#: The declared list.
LIST = files("fewstep.eval") / "methods.yaml"
#: The teachers' rows.
TEACHER = "teacher"


@dataclass(frozen=True)
class Training:
    """One student.

    Args:
        name: of the method or of its variant, as the table calls it.
        method: a file name of ``fewstep.trainers``.
        teacher: an embedded one.
        steps: what the student is trained for.
        at: the step counts it is evaluated at; default the one it is trained for.
        settings: of the run, over those of the recipe.
        seeds: that are run where none are asked for.
        scratch: the student starts from fresh weights, not from the teacher's.
        gated: False for a run that is shown without a claim, as those from scratch are.
    """

    name: str
    method: str
    teacher: str
    steps: int
    at: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    scratch: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        if self.teacher not in TEACHERS:
            raise UserError(f"{self.name}: {self.teacher!r} is no embedded teacher: {', '.join(TEACHERS)}")
        for name in ("at", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.at:
            object.__setattr__(self, "at", (self.steps,))

    @property
    def title(self) -> str:
        """Tells it from all other trainings."""
        return f"{self.name}_{self.teacher}_{self.steps}"

    def config(self, seed: int, out: Path | str = "", resume: bool = False, init: Path | None = None) -> RunConfig:
        """Of the run: the recipe of this method and teacher, the changed settings over it.

        Args:
            seed: of the run.
            out: its folder.
            resume: go on with what is there.
            init: the fresh weights of a student from scratch.

        Raises:
            UserError: there is no such recipe, or a setting does not fit.
        """
        recipe = files("fewstep.trainers") / "configs" / f"{self.method}_{self.teacher.replace('-', '_')}.yaml"
        if not recipe.is_file():
            raise UserError(f"{self.name}: there is no recipe {recipe.name}")
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"steps": self.steps} | dict(self.settings)
        settings |= {"teacher": self.teacher, "out": str(out), "seed": seed, "resume": resume, "report_to": "none"}
        settings |= {"init": str(init)} if init is not None else {}
        try:
            return method_class(self.method).Config(**settings)
        except TypeError as error:
            raise UserError(f"{self.name}: {self.method} has no such setting: {error}") from error

    def content(self) -> dict[str, Any]:
        """What the student depends on, seed and machine apart."""
        config = self.config(0).resolved()
        settings = json.loads(json.dumps(config.as_dict(), default=str))
        # The teacher is said by its files.
        apart = names_of(type(config), "machine", "watching") | {"teacher", "seed"}
        kept = {k: v for k, v in settings.items() if k not in apart}
        content: dict[str, Any] = {"method": self.method, "teacher": _teacher(self.teacher), "settings": kept}
        if self.scratch:
            content["scratch"] = True
        if settings["data"] == "fashion" or looking(self.teacher):  # whose own items are of them
            content["images"] = _file(TRAINING_IMAGES)
        return content

    def defaults(self) -> dict[str, Any]:
        """Settings that have a default."""
        known = fields(method_class(self.method).Config)
        return {item.name: item.default for item in known if item.default is not MISSING}


@dataclass(frozen=True)
class Cell:
    """A model at one step count; without a training it is the teacher itself.

    num: samples that it is judged by.
    """

    teacher: str
    steps: int
    num: int
    training: Training | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """As ``--only`` and the table know it; the seed is no part of it."""
        if self.training is None:
            return f"{TEACHER}_{self.teacher}_{self.steps}"
        shared = "" if self.training.at == (self.training.steps,) else f"of{self.training.steps}"
        return f"{self.training.name}_{self.teacher}_{self.steps}{shared}"

    @property
    def file(self) -> str:
        """Of its result, without the suffix."""
        return self.name if self.training is None else f"{self.name}.seed{self.seed}"

    def content(self) -> dict[str, Any]:
        """All that its numbers depend on, but for the seed of the training, the machine, and the code."""
        judge = {"classifier": _file(CLASSIFIER), "reference": _file(REFERENCE)}
        judge |= {"pictures": _file(HELD_BACK_IMAGES)} if looking(self.teacher) else {}
        judged = {"evaluation": {"num": self.num, "steps": self.steps, "seed": 0, **judge}}
        if self.training is None:
            return {"teacher": _teacher(self.teacher), **judged}
        return {**self.training.content(), **judged}


def digest(content: Mapping[str, Any]) -> str:
    """The hash of what a cell depends on."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def as_of(cell: Cell, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell depends on now, in the words that a result was recorded in.

    A setting that did not exist then and has its default now changes nothing, and is left out.
    """
    content = cell.content()
    if cell.training is not None:
        defaults, known = cell.training.defaults(), recorded.get("settings", {})
        settings = content["settings"]
        content["settings"] = {
            name: value for name, value in settings.items() if name in known or value != defaults.get(name, MISSING)
        }
    return content


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two contents, by name."""
    found = []
    for name in sorted({*recorded, *present}):
        then, now = recorded.get(name), present.get(name)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            found += differences(then, now, f"{path}{name}.")
        elif then != now:
            found.append(f"{path}{name} was {then!r} and is {now!r}")
    return found


@dataclass(frozen=True)
class CellPlan:
    """The declared list: trainings in the table's order, the teachers' step counts, and samples for every row."""

    trainings: tuple[Training, ...]
    teacher_steps: tuple[int, ...]
    num: int

    def cells(self, seeds: Sequence[int] | None = None, num: int | None = None) -> list[Cell]:
        """The teachers' cells, then the students', grouped by training.

        Args:
            seeds: of every training; default each one's own.
            num: samples; default the list's.
        """
        num = num or self.num
        teachers = dict.fromkeys(training.teacher for training in self.trainings)
        cells = [Cell(teacher, steps, num) for teacher in teachers for steps in self.teacher_steps]
        for training in self.trainings:
            for seed in seeds or training.seeds:
                cells += [Cell(training.teacher, steps, num, training, seed) for steps in training.at]
        return cells


def read_plan(path: Any = LIST) -> CellPlan:
    """The declared list.

    Raises:
        UserError: it cannot be read, says what nobody understands, or lists one training twice.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        trainings = tuple(Training(**entry) for entry in content["trainings"])
        plan = CellPlan(trainings, tuple(content["teacher_steps"]), content["num"])
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no list of cells: {' '.join(str(error).split())}") from error
    titles = [training.title for training in trainings]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise UserError(f"{path} lists {', '.join(twice)} twice")
    return plan


def _teacher(name: str) -> dict[str, Any]:
    """The teacher's files as one digest, and its stated guidance."""
    theirs = {path: about["sha256"] for path, about in manifest()["files"].items() if path.startswith(f"{name}/")}
    return {"name": name, "files": digest(theirs), "guidance_scale": TEACHERS[name].guidance_scale}


def _file(name: str) -> str:
    return manifest()["files"][name]["sha256"][:16]
