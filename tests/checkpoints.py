"""The newest checkpoint of a run, as one look at all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.training.checkpoint import find_latest


def load_latest(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """State and tensors of the newest whole checkpoint in ``OUT/checkpoints``."""
    found = find_latest(folder)
    return found.state, found.tensors()
