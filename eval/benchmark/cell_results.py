"""What a finished cell leaves: a small JSON file, and for its first seed a strip of samples.

The files are committed, so that table and picture are made again without training; they are bound by a hash to what
their numbers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.durable import write_durably, write_text_durably
from fewstep.errors import UserError
from fewstep.eval.benchmark.cells import Cell, as_of, differences, digest
from fewstep.eval.grid import to_pil

#: Where results lie in a checkout.
RESULTS = Path("eval/results")


@dataclass(frozen=True)
class Result:
    """The numbers of one cell.

    metrics: ``fd_test``, ``agreement``, ``recall``, of models that fill holes ``kept``. nfe: network evaluations for a
    sample, counted. seconds: ``training`` (of the whole training, which several cells may share) and ``evaluation``;
    CPU time.
    calls: network calls of the training, by role and by what flows back, in samples. content: what all of it depends
    on, and ``hash`` its digest.
    """

    cell: str
    seed: int
    num: int
    nfe: float
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    calls: Mapping[str, Mapping[str, float]]
    versions: Mapping[str, str]
    threads: int
    content: Mapping[str, Any]
    hash: str


def write_result(results: Path, cell: Cell, result: Result, strip: Tensor | None) -> None:
    """Keep a finished cell; the JSON comes last, so that where it stands the cell is complete.

    Args:
        results: folder.
        cell: that was run.
        result: of it.
        strip: samples uint8 (columns, C, H, W), or None to keep none.
    """
    results.mkdir(parents=True, exist_ok=True)
    if strip is not None:
        picture = to_pil(torch.cat(list(strip), dim=-1)).convert("L")
        write_durably(strip_path(results, cell), lambda path: picture.save(path, format="PNG", optimize=True))
    write_text_durably(results / f"{cell.file}.json", json.dumps(asdict(result), indent=1) + "\n")


def read_result(results: Path, cell: Cell) -> Result | None:
    """What is kept of a cell, or None.

    Raises:
        UserError: the file is damaged, or what its numbers depend on does not fit its hash.
    """
    path = results / f"{cell.file}.json"
    if not path.is_file():
        return None
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no result of a cell; remove it and run make methods") from error
    if digest(result.content) != result.hash:
        raise UserError(f"{path} does not fit its own hash; remove it and run make methods")
    return result


def why_stale(cell: Cell, result: Result) -> str | None:
    """One line that says why a result no longer counts, or None where it does."""
    present = as_of(cell, result.content)
    if digest(present) == result.hash:
        return None
    reasons = differences(result.content, present)
    return f"{cell.file} is stale: {'; '.join(reasons)}. Run make methods"


def state(results: Path, cell: Cell) -> str:
    """done, stale or missing."""
    result = read_result(results, cell)
    if result is None:
        return "missing"
    return "done" if why_stale(cell, result) is None else "stale"


def strip_path(results: Path, cell: Cell) -> Path:
    """Where a cell's samples lie; all seeds share it."""
    return results / f"{cell.name}.png"


def read_strip(results: Path, cell: Cell) -> Tensor | None:
    """A cell's samples uint8 (columns, 1, H, H), or None where no strip is kept."""
    path = strip_path(results, cell)
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("L")))
    return torch.stack(pixels.split(pixels.shape[0], dim=-1))[:, None]
