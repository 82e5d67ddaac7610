"""``auto`` in the place of a method's name: the measured best for this kind of teacher, step count and images."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env
from diffusers import DiffusionPipeline

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.programs.choice import Candidate, Evidence, choices, shipped_evidence
from fewstep.programs.methods import method_class
from fewstep.recording.pipeline import find_scheduler
from fewstep.teachers.kind import IN_WORDS, Kind, kind_of_scheduler, scheduler_of
from fewstep.teachers.names import embedded_name
from fewstep.teachers.source import find_source
from fewstep.training.run_folder import has_run, read_config

logger = logging.getLogger("fewstep")

#: What is said in the place of a method.
CHOOSE = "auto"
#: Settings that belong to real images.
_OF_IMAGES = ("data", "data_text", "data_workers")

#: Where one of these is asked for, what the recipe says of settings with such ends that follow from it by default.
_FOLLOWERS = {"max_steps": ("_steps", "_step"), "lr": ("_lr",)}


@dataclass(frozen=True)
class Decision:
    """What ``auto`` stands for.

    Attributes:
        method: that runs, and by which the run and its student are called.
        config: of the run.
        command: the same as a command line.
        why: lines for people.
    """

    method: str
    config: RunConfig
    command: str
    why: tuple[str, ...]

    def say(self) -> None:
        """Log why, and the command; of the processes of a launch one does."""
        if get_int_from_env(("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"), 0) == 0:  # the launch is joined by the run
            for line in (*self.why, f"auto stands for: {self.command}"):
                logger.info(line)


def decide(
    given: Mapping[str, Any], pipeline: DiffusionPipeline | None = None, evidence: Evidence | None = None
) -> Decision:
    """The method and all settings of a run.

    Args:
        given: settings of :class:`RunConfig`, those alone that were asked for; ``teacher`` is one of them.
        pipeline: the teacher's, where it is in memory already.
        evidence: default that of this package.

    Raises:
        UserError: a setting is none that all methods share, or cannot be meant; the teacher's kind cannot be told; or
            the chosen method does not take the settings.
    """
    refuse_foreign(given)
    asked = RunConfig(**{"out": "", **given})
    given = {name: getattr(asked, name) for name in given}  # paths as texts, numbers as plain ones
    if asked.resume and has_run(Path(asked.out)):
        return _continued(given, Path(asked.out))
    kind, images = _kind_of(asked, pipeline), asked.data is not None
    evidence = shipped_evidence() if evidence is None else evidence
    refusals = []
    for candidate in evidence.in_order(kind, asked.steps, images):
        try:
            method, config, settings = _run_of(candidate, given)
        except UserError as refusal:
            refusals.append((candidate, refusal))
            continue
        why = _why(candidate, evidence, kind, asked)
        why += [f"auto: passed over {other.method}: {refusal}" for other, refusal in refusals]
        return Decision(method, config, _command(method, settings), tuple(why))
    if not refusals:
        raise UserError(f"no method was measured for {IN_WORDS[kind]}; name one in the place of {CHOOSE}")
    raise refusals[0][1]


def refuse_foreign(names: Iterable[str]) -> None:
    """Raise ``UserError`` for a name that is no setting of :class:`RunConfig`, and so of one method or of none."""
    shared = {"config", *(field.name for field in fields(RunConfig))}
    if foreign := [name for name in names if name not in shared]:
        raise UserError(
            f"--{foreign[0]} is no flag that all methods share, and {CHOOSE} takes those alone; leave it out, and "
            f"add it to the command that {CHOOSE} prints"
        )


def _kind_of(config: RunConfig, pipeline: DiffusionPipeline | None) -> Kind:
    """By the teacher's scheduler, before any weights are loaded."""
    teacher = f"--teacher {config.teacher}"
    if pipeline is None:
        source = find_source(
            config.teacher, revision=config.revision, subfolder=config.subfolder, variant=config.variant, weights=False
        )
        scheduler = scheduler_of(source, teacher)
    else:
        scheduler = getattr(pipeline, find_scheduler(pipeline))
    try:
        return kind_of_scheduler(scheduler)
    except ValueError as error:
        raise UserError(f"{teacher} is of no kind that {CHOOSE} knows: {error}") from error


def _run_of(candidate: Candidate, given: Mapping[str, Any]) -> tuple[str, RunConfig, dict[str, Any]]:
    """A candidate's method with the settings that were asked for, which win over those of its recipe."""
    config_class = method_class(candidate.method).Config
    same = embedded_name(given["teacher"]) == candidate.teacher
    recipe = dict(candidate.settings) if same else choices(config_class, RunConfig, candidate.settings)
    if not candidate.images:  # some methods would take them for another purpose
        given = {name: value for name, value in given.items() if name not in _OF_IMAGES}
    defaults = {field.name: field.default for field in fields(config_class)}
    following = tuple(end for name, ends in _FOLLOWERS.items() if name in given for end in ends)
    recipe = {n: v for n, v in recipe.items() if not (n.endswith(following) and defaults[n] is None)}
    settings = {"steps": RunConfig.steps} | recipe | _as_named_by(config_class, given)
    return candidate.method, config_class(**{"out": "", **settings}), settings


def _continued(given: Mapping[str, Any], out: Path) -> Decision:
    """The run that is there already, whatever would be chosen today; what was asked for anew wins."""
    theirs = read_config(out)
    method = str(theirs.pop("method", None))
    config_class = method_class(method).Config
    if "init" not in given:  # it may be gone, once there is a checkpoint
        theirs.pop("init", None)
    settings = theirs | _as_named_by(config_class, given)
    try:
        config = config_class(**settings)
    except TypeError as error:
        raise UserError(f"{out / 'config.yaml'} has settings that {method} has not: {error}") from error
    defaults = {field.name: field.default for field in fields(config_class)}
    told = {name: value for name, value in settings.items() if value != defaults[name] or name in given}
    return Decision(method, config, _command(method, told), (f"auto goes on with {method}, which {out} is a run of",))


def _as_named_by(config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Where ``variant`` names a paper, that of the teacher's weights is ``teacher_variant``."""
    other = any(field.name == "teacher_variant" for field in fields(config_class))
    return {"teacher_variant" if other and name == "variant" else name: value for name, value in given.items()}


def _why(candidate: Candidate, evidence: Evidence, kind: Kind, asked: RunConfig) -> list[str]:
    """What the choice rests on, how far that is from this run, and what else there was."""
    counted = f"{candidate.seeds} seeds" if candidate.seeds > 1 else "one seed"
    measured = (
        f"{candidate.over:.2f} times the FD of {candidate.teacher} at {candidate.teacher_steps} steps "
        f"({candidate.cell}, {counted})"
    )
    images = "with real images" if candidate.images else "without images"
    lines = [f"auto: {candidate.method}, {images}, for {IN_WORDS[kind]} at {_steps(asked.steps)}: {measured}"]
    if candidate.steps != asked.steps:
        lines.append(
            f"auto: nothing was measured at {_steps(asked.steps)}; this is the choice at {_steps(candidate.steps)}"
        )
    if kind == "edm":
        lines.append("auto: no EDM teacher was measured; this is the choice for flow-matching teachers")
    if embedded_name(asked.teacher) == candidate.teacher:
        lines.append("auto: the settings are those of that cell")
    else:
        lines.append(
            "auto: the evidence is two teachers of a few million parameters and 32x32 images; rates, sizes and lengths "
            "that were chosen for them are left at the method's defaults"
        )
        if (scale := candidate.settings.get("guidance_scale")) is not None:
            lines.append(
                f"auto: there the teacher was guided by {scale:g}, less than by its own call; here it is guided as "
                "its call says, or by --guidance_scale"
            )
    if asked.data is not None and not candidate.images:
        lines.append("auto: this was best without images, so --data is left out")
    if asked.data is None:
        other = next(iter(evidence.in_order(kind, asked.steps, images=True)), candidate)
        if other.images and other.steps == candidate.steps:
            lines.append(f"auto: with real images (--data) it would be {other.method}, {other.over:.2f} times")
    return lines


def _steps(number: int) -> str:
    return f"{number} step{'s' * (number > 1)}"


def _command(method: str, settings: Mapping[str, Any]) -> str:
    """The command line that means the same."""
    first = {name: settings[name] for name in ("teacher", "out") if settings.get(name)}
    rest = {name: value for name, value in settings.items() if name not in ("teacher", "out")}
    words = [word for name, value in (first | rest).items() for word in (f"--{name}", _word(value))]
    return shlex.join(["fewstep", "distill", method, *words])


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)
