"""A run's folder: whose it is, and whether a run may start or go on in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from fewstep.config.checks import names_of
from fewstep.config.run import RunConfig
from fewstep.config.values import shown
from fewstep.data.durable import write_durably
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.errors import UserError
from fewstep.reading import read_yaml
from fewstep.training import checkpoint
from fewstep.training.inputs import read_inputs, recorded_as

_CONFIG, _PARTIAL = "config.yaml", ".config.yaml.partial"


def check_folder(
    out: Path, method: str, config: RunConfig, in_memory: bool = False, beside: Sequence[str] = ()
) -> bool:
    """Whether there is a checkpoint to go on from; nothing is written but an empty folder.

    Args:
        out: the run's folder.
        method: its name.
        config: of the run.
        in_memory: the teacher was handed over as a pipeline.
        beside: what may lie there before the run begins.

    Raises:
        UserError: the folder cannot be written, holds another run, or ``--resume`` does not fit what is there.
    """
    if not config.out:
        raise UserError("--out is empty; name a folder for the run")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} cannot be written; choose another folder")
    file = out / _CONFIG
    if not file.exists():
        if config.resume:
            raise UserError(f"--resume: {out} holds no run; leave out --resume to start one")
        if any(path.name not in (_PARTIAL, INDEX_FOLDER, *beside) for path in out.iterdir()):
            raise UserError(f"--out {out} is not empty and holds no run of fewstep; choose another folder")
        return False
    if not config.resume:
        raise UserError(f"--out {out} already holds a run; add --resume to go on with it, or choose another folder")
    theirs = read_config(out)
    # A setting that was not there yet when the run began was what its default is now.
    theirs = {field.name: field.default for field in fields(config) if field.default is not MISSING} | theirs
    steps = checkpoint.steps_in(out / "checkpoints")
    may_change = _may_change(config) | _compared_by_contents(out, theirs, config, bool(steps), in_memory)
    if steps:  # fewstep.training.shares compares their product with that of the checkpoint
        may_change |= {"batch_size", "gradient_accumulation_steps"}
    mine = _described(method, config)
    if changed := _differences(theirs, mine, may_change):
        # One alone may follow from another (a length), so that nobody gave it here.
        values = f" ({shown(theirs.get(changed[0]))} there, {shown(mine.get(changed[0]))} here)" * (len(changed) == 1)
        raise UserError(
            f"--resume: {', '.join(changed)} differ from {file}{values}; give the run its old settings or another --out"
        )
    if steps and steps[-1] > config.max_steps:  # what is written would be said to have had fewer
        raise UserError(
            f"--max_steps {config.max_steps}: the run in {out} is at step {steps[-1]} already; give no fewer"
        )
    return bool(steps)


def has_run(out: Path) -> bool:
    """Whether a run has begun in ``out``."""
    return (out / _CONFIG).exists()


def read_config(out: Path) -> dict[str, Any]:
    """The settings of the run in ``out``, with its method.

    Raises:
        UserError: they cannot be read.
    """
    file = out / _CONFIG
    try:
        return dict(read_yaml(file))
    except (OSError, TypeError, ValueError) as error:  # unreadable, or YAML that is no table
        raise UserError(f"{file} cannot be read; choose another --out") from error


def write_config(out: Path, method: str, config: RunConfig) -> None:
    """Make ``out`` this run's folder."""
    text = yaml.safe_dump(_described(method, config), sort_keys=False, allow_unicode=True)
    write_durably(out / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"), _PARTIAL)


def forget_run(out: Path) -> None:
    """Let ``out`` be nobody's folder again."""
    (out / _CONFIG).unlink(missing_ok=True)


def _described(method: str, config: RunConfig) -> dict[str, Any]:
    return {"method": method, **config.resolved().as_dict()}


def _may_change(config: RunConfig) -> frozenset[str]:
    """Settings that a resumed run may change, because the weights do not depend on them."""
    # A run does not move between CPU and GPU. Its length does matter where a curriculum follows it.
    stays = {"cpu", "max_steps"} if config.follows_max_steps else {"cpu"}
    return names_of(type(config), "machine", "watching", "export", "length") - stays


def _compared_by_contents(
    out: Path, theirs: dict[str, Any], config: RunConfig, trained: bool, in_memory: bool
) -> frozenset[str]:
    """Inputs that may lie elsewhere by now, because :class:`fewstep.training.inputs.RunInputs` compares what they are.

    What came of ``--init`` is in the checkpoint, so it may be left out once there is one.
    """
    recorded = read_inputs(out)
    sources = {name for name in names_of(type(config), "source") if theirs.get(name) is not None}
    given = {name for name in sources if getattr(config, name) is not None}
    # Of files and of what is in memory the digests are not of one kind: there only the names can be compared.
    moved = {name for name in given if recorded_as(name, in_memory) in recorded}
    moved |= {"revision", "subfolder"} if "teacher" in moved else set()  # they say where the teacher lies
    left_out = {"init"} if trained and "init" in sources and config.init is None else set()
    return frozenset(moved | left_out)


def _differences(theirs: dict[str, Any], mine: dict[str, Any], may_change: frozenset[str]) -> list[str]:
    names = sorted((theirs.keys() | mine.keys()) - may_change)
    return [name for name in names if theirs.get(name) != mine.get(name)]
