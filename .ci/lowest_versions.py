"""Prints what ``pyproject.toml`` admits at least of every direct dependency, as constraints for ``pip install -c``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

#: ``name[extras]>=version``; every dependency states a floor in this form, and nothing else.
_FLOOR = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)")


def lowest_versions(pyproject: Path) -> list[str]:
    """``name==version`` of every direct dependency.

    Raises:
        ValueError: one of them states no floor.
    """
    lines = []
    for wanted in tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]:
        match = _FLOOR.fullmatch(wanted)
        if match is None:
            raise ValueError(f"{wanted} has no floor of the form name>=version")
        lines.append(f"{match[1]}=={match[2]}")
    return lines


if __name__ == "__main__":
    print("\n".join(lowest_versions(Path(__file__).resolve().parents[1] / "pyproject.toml")))
