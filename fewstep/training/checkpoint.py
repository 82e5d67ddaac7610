"""Checkpoints: complete or absent, never half written, never unpickled.

``OUT/checkpoints/step_00000500/`` holds one safetensors file of weights and one of optimizer state per trainable role
(of a sharded run one file for each process, :mod:`fewstep.training.shard_files`) and ``state.json`` with the counters,
the method, the size and SHA-256 of every file, and a SHA-256 of all that.

A checkpoint gets its name when all of it is on the disk, and loses it before anything of it is removed. What is broken
all the same, as a disk or a copy can break files, is passed over in favour of the newest whole one, which says so.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.durable import file_sha256, flush, json_sha256
from fewstep.errors import UserError, one_line
from fewstep.reading import misfit, read_json
from fewstep.training import shard_files

_STATE = "state.json"
# Of the run alone: what is being written, and what is being removed.
_PARTIAL, _REMOVED = ".partial_", ".removed_"


@dataclass(frozen=True)
class Found:
    """A checkpoint, every file of which is what was written.

    Attributes:
        folder: of the checkpoint.
        state: as :func:`save` was given it, with ``step`` and ``files``.
        note: one line for people where newer ones are damaged, else empty.
    """

    folder: Path
    state: dict[str, Any]
    note: str = ""

    @property
    def sharded(self) -> list[str] | None:
        """The stems of which its files hold parts; None where they are the files."""
        return self.state.get("sharded")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> name -> whole tensor, as :func:`save` was given them.

        Raises:
            UserError: a file is what was written, and holds no tensors.
        """
        if self.sharded is not None:
            return shard_files.read(self.folder, self.sharded)
        files = [self.folder / name for name in self.state["files"]]
        try:
            return {file.stem: load_file(file) for file in files}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder} is no checkpoint: {one_line(error)}; remove that folder") from error


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step``, in the place of one that is there, and remove all but the newest ``keep``.

    Args:
        folder: ``OUT/checkpoints``.
        step: number of steps done.
        tensors: file stem -> name -> tensor.
        state: JSON-able counters.
        keep: how many checkpoints stay.

    Raises:
        UserError: the disk is full or does not take it; the older checkpoints are untouched.
    """
    with written(folder, step, state, keep) as partial:
        for stem, values in tensors.items():
            # Copies, because a file cannot hold tensors that share memory, as tied weights do.
            copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
            save_file(copies, partial / f"{stem}.safetensors")
    return _path(folder, step)


@contextmanager
def written(folder: Path, step: int, state: dict[str, Any], keep: int) -> Iterator[Path]:
    """Inside, the files of a checkpoint are written to the folder that is given; afterwards it has its name.

    Damaged checkpoints do not count among those that are kept: they go when whole ones that are newer are enough.

    Raises:
        UserError: the disk is full or does not take it; the older checkpoints are untouched.
    """
    final, partial = _path(folder, step), folder / f"{_PARTIAL}{step:08d}"
    try:
        _begin(partial)
        yield partial
        _seal(partial, step, state)
        _give_name(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = [old for old in steps_in(folder) if old < step and looks_whole(folder, old)]
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error}); make room on the disk, then --resume"
            + (f" from step {kept[-1]}" if kept else "")
        ) from error
    keep_newest(folder, step, keep)


def _begin(partial: Path) -> None:
    """Make the folder of a checkpoint that is going to be written."""
    folder = partial.parent
    _remove_left_over(folder)
    if not folder.exists():
        folder.mkdir(parents=True)
        flush(folder.parent)
    partial.mkdir()


def _give_name(partial: Path, final: Path) -> None:
    """Give a checkpoint its name, in the place of one that has it."""
    if final.exists():
        _remove(final)
    os.rename(partial, final)
    flush(final.parent)


def _seal(partial: Path, step: int, state: dict[str, Any]) -> None:
    """Say in a last file what the others are, and have all of them on the disk."""
    paths = sorted(partial.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
    content = {"step": step, **state, "files": files}
    (partial / _STATE).write_text(json.dumps({**content, "sha256": json_sha256(content)}, indent=1))
    for path in [*partial.iterdir(), partial]:  # the rename must not become durable before what it names
        flush(path)


def keep_newest(folder: Path, step: int, keep: int) -> None:
    """Remove what is older than the newest ``keep`` whole ones up to ``step``, which is whole, and what a kill left.

    Newer ones are damaged, or it would have been gone on from them; they are replaced when their step comes.
    """
    _remove_left_over(folder)
    whole = 0
    for old in reversed(steps_in(folder)):
        path = _path(folder, old)
        if whole >= keep:
            _remove(path)
        elif old <= step:
            whole += old == step or looks_whole(folder, old)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that none is ever seen with a part of its files."""
    unnamed = path.with_name(_REMOVED + path.name)
    os.rename(path, unnamed)
    shutil.rmtree(unnamed)


def _remove_left_over(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written or removed."""
    for path in [*folder.glob(f"{_PARTIAL}*"), *folder.glob(f"{_REMOVED}*")]:
        shutil.rmtree(path)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending; one of them may be damaged."""
    numbers = (path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def find_latest(folder: Path, up_to: int | None = None) -> Found:
    """The newest whole checkpoint in ``folder``; all of it is read once and checked. Nothing is changed.

    Args:
        folder: ``OUT/checkpoints``.
        up_to: pass over those of later steps.

    Raises:
        UserError: there is none.
    """
    steps = [step for step in steps_in(folder) if up_to is None or step <= up_to]
    if not steps:
        raise UserError(f"{folder} holds no checkpoint to go on from; leave out --resume to start afresh")
    damaged: dict[int, str] = {}
    for step in reversed(steps):
        path = _path(folder, step)
        try:
            state = _read_state(path)
            _refuse_altered(path, state)
        except _DamagedError as error:
            damaged[step] = str(error)
            continue
        return Found(path, state, _note(folder, step, damaged))
    told = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
    raise UserError(f"no checkpoint in {folder} is whole ({told}); put one back, or remove that folder to start afresh")


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than this one, newest first."""
    for later in reversed(steps_in(folder)):
        if later > step:
            _remove(_path(folder, later))


def find_step(folder: Path, step: int) -> Found:
    """The checkpoint of a step; all of it is read once and checked.

    Raises:
        UserError: it is damaged, or there is none.
    """
    path = _path(folder, step)
    try:
        state = _read_state(path)
        _refuse_altered(path, state)
    except _DamagedError as error:
        raise UserError(f"{path} is not whole: {error}; put it back, or remove it") from error
    return Found(path, state)


def looks_whole(folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step has all its files in their sizes; what is in them is not read."""
    path = _path(folder, step)
    try:
        _refuse_altered(path, _read_state(path), read=False)
    except _DamagedError:
        return False
    return True


def give_second_place(folder: Path, step: int, other: Path) -> None:
    """Have the checkpoint of a step in another folder too: the same files where the disk can do that, else copies.

    Raises:
        UserError: the disk is full or does not take it.
    """
    final, partial = _path(other, step), other / f"{_PARTIAL}{step:08d}"
    try:
        _begin(partial)
        for file in sorted(_path(folder, step).iterdir()):
            try:
                os.link(file, partial / file.name)
            except OSError:  # a file has one name on such a disk
                shutil.copy2(file, partial / file.name)
            flush(partial / file.name)
        flush(partial)
        _give_name(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{final} could not be written ({error}); make room on the disk, then --resume") from error


def remove_all_but(folder: Path, step: int | None) -> None:
    """Remove the checkpoints of all other steps, and what a kill left."""
    _remove_left_over(folder)
    for other in steps_in(folder):
        if other != step:
            _remove(_path(folder, other))


class _DamagedError(Exception):
    """A file of a checkpoint is missing or is not what was written."""


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = dict(read_json(path / _STATE))
        digest = state.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{_STATE} cannot be read") from error
    # A digest can be made by anybody, and a file's name may lead anywhere.
    wrong = misfit(state, {"step": int, "files": dict}) or any(
        PurePath(name).name != name or misfit(entry, {"bytes": int, "sha256": str})
        for name, entry in state["files"].items()
    )
    if wrong or digest != json_sha256(state) or path.name != f"step_{state['step']:08d}":
        raise _DamagedError(f"{_STATE} is not what was written")
    return state


def _refuse_altered(path: Path, state: dict[str, Any], *, read: bool = True) -> None:
    for name, expected in state["files"].items():
        file = path / name
        try:
            same = file.stat().st_size == expected["bytes"] and (not read or file_sha256(file) == expected["sha256"])
        except OSError as error:
            raise _DamagedError(f"{name} cannot be read") from error
        if not same:
            raise _DamagedError(f"{name} is not what was written")


def _note(folder: Path, step: int, damaged: dict[int, str]) -> str:
    if not damaged:
        return ""
    told = "; ".join(f"step {number}: {why}" for number, why in damaged.items())
    return (
        f"{len(damaged)} newer checkpoint{'s' * (len(damaged) > 1)} in {folder} cannot be used ({told}): going on "
        f"from step {step}, and what came after is trained again"
    )
