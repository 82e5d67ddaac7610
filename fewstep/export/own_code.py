"""Code that a student brings along: run without being asked only where it is this package's own, to the letter."""

from __future__ import annotations

import ast
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers

from fewstep.reading import read_json

_STOCK = re.compile(r"^from diffusers import (\w+) as Stock  # <- stock$", re.M)
_EXPERTS = re.compile(r"^EXPERTS: tuple\[str, \.\.\.\] = (\([\w', ]*\))  # <- experts$", re.M)


def is_own_code(folder: str | Path) -> bool:
    """Whether a folder's pipeline or scheduler is run by copies of files of ``pipelines/``, and nothing else is."""
    folder = Path(folder)
    code = _code_file(folder)
    if code is None:
        return False
    if not _looks_inside_alone(folder):
        return False
    own = {path.name: _digest(path) for path in _pipelines()}
    # A part of the pipeline whose class is in the same file has a copy of it beside its weights, a scheduler its own.
    return all((found := _digest(path)) and found == own.get(path.name) for path in folder.rglob("*.py"))


def _looks_inside_alone(folder: Path) -> bool:
    """Whether no part of a folder's pipeline can bring code from elsewhere: by a path for a name, or by a link."""
    entries = [entry for entry in read_json(folder / "model_index.json").values() if isinstance(entry, list)]
    # A part is two words; what else is in a list (the times of phases) names nothing.
    named = [name for entry in entries for name in entry if isinstance(name, str)]
    plain = all(re.fullmatch(r"\w+(\.\w+)*", name) for name in named)
    return plain and not any(path.is_symlink() and path.is_dir() for path in folder.rglob("*"))


def stock_class_of(folder: str | Path) -> type[Any] | None:
    """The stock class that a folder's own code extends; None where it has no such code."""
    code = _code_file(Path(folder))
    if code is None or not is_own_code(folder):
        return None
    found = _STOCK.search(code.read_text(encoding="utf-8"))
    return getattr(diffusers, found[1], None) if found else None


def _code_file(folder: Path) -> Path | None:
    """The file that ``model_index.json`` names as the home of the pipeline's class, or else of its scheduler's."""
    try:
        index = read_json(folder / "model_index.json")
    except (OSError, ValueError):
        return None
    for name, place in (("_class_name", folder), ("scheduler", folder / "scheduler")):
        named = index.get(name) if isinstance(index, dict) else None
        if isinstance(named, list) and named and re.fullmatch(r"\w+", str(named[0])):
            path = place / f"{named[0]}.py"
            if path.is_file():
                return path
    return None


def _pipelines() -> list[Path]:
    spec = find_spec("fewstep.pipelines")
    places = None if spec is None else spec.submodule_search_locations
    return [path for place in places or () for path in Path(place).glob("*.py")]


def _digest(path: Path) -> str | None:
    text = _without_choices(path)
    return None if text is None else hashlib.sha256(text.encode("utf-8")).hexdigest()


def _without_choices(path: Path) -> str | None:
    """The text without the lines, two at most, that differ from copy to copy; None where they say more than names."""
    text = path.read_text(encoding="utf-8")
    stock, experts = _STOCK.findall(text), _EXPERTS.findall(text)
    if len(stock) != text.count("# <- stock\n") or len(stock) > 1 or len(experts) != text.count("# <- experts\n"):
        return None
    if not experts:
        return _STOCK.sub("", text)
    try:
        names = ast.literal_eval(experts[0])
    except (ValueError, SyntaxError):
        return None
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        return None
    return _EXPERTS.sub("", _STOCK.sub("", text))
