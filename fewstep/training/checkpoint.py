"""Checkpoints: complete or absent, never half written, never unpickled.

``OUT/checkpoints/step_00000500/`` holds one safetensors file of weights and one of optimizer state per trainable role
and ``state.json`` with the counters, the method, the size and SHA-256 of every file, and a SHA-256 of all that.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.durable import file_sha256, flush, json_sha256
from fewstep.errors import UserError


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    Args:
        folder: ``OUT/checkpoints``.
        step: number of steps done.
        tensors: file stem -> name -> tensor.
        state: JSON-able counters.
        keep: how many checkpoints stay.

    Raises:
        UserError: the disk is full or does not take it; the older checkpoints are untouched.
    """
    final = folder / f"step_{step:08d}"
    if final.exists():
        return final
    partial = folder / f".partial_{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, step, tensors, state)
        os.rename(partial, final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = steps_in(folder)
        raise UserError(
            f"the checkpoint of step {step} could not be written ({error}); make room on the disk, then --resume"
            + (f" from step {kept[-1]}" if kept else "")
        ) from error
    for old in steps_in(folder)[:-keep]:
        shutil.rmtree(folder / f"step_{old:08d}")
    return final


def _write(partial: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    partial.mkdir(parents=True)
    files = {}
    for stem, values in tensors.items():
        path = partial / f"{stem}.safetensors"
        # Copies, because a file cannot hold tensors that share memory, as tied weights do.
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
        save_file(copies, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    content = {"step": step, **state, "files": files}
    (partial / "state.json").write_text(json.dumps({**content, "sha256": json_sha256(content)}, indent=1))
    for path in partial.iterdir():  # the rename below must not become durable before what it names
        flush(path)


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, ascending."""
    numbers = (path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir())
    return sorted(int(number) for number in numbers if number.isdecimal())


def load_latest(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """State and tensors of the newest checkpoint in ``folder``, as :func:`save` was given them.

    Raises:
        UserError: there is none, or a file of it is missing, truncated or altered.
    """
    steps = steps_in(folder)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint to go on from; leave out --resume to start afresh")
    path = folder / f"step_{steps[-1]:08d}"
    advice = f"the checkpoint {path} is damaged ({{}}); remove that folder to go on from the one before"
    try:
        state = json.loads((path / "state.json").read_text())
        intact = state.pop("sha256") == json_sha256(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(advice.format("state.json cannot be read")) from error
    if not intact or state["step"] != steps[-1]:
        raise UserError(advice.format("state.json is not what was written"))
    tensors = {}
    for name, expected in state["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != expected["bytes"] or file_sha256(file) != expected["sha256"]:
            raise UserError(advice.format(f"{name} is not what was written"))
        tensors[file.stem] = load_file(file)
    return state, tensors
