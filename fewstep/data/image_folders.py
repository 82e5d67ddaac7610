"""Which files of a folder are images, which sub-folders are classes, and what is passed over.

A class keeps its number: it counts among all visible sub-folders in alphabetical order, also those without an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
#: Folders that systems and tools put among a user's, beside those whose names begin with a dot.
_OF_SYSTEMS = frozenset(
    {"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
_SHOWN = 20  # classes, or suffixes, in one line


@dataclass(frozen=True)
class ImageFolder:
    """What was found in a folder.

    Attributes:
        files: the images, by class and by name.
        classes: the names of the class folders in the order of their numbers; empty where there are none.
        passed_over: reason -> number of files that are no data.
    """

    files: list[Path]
    classes: tuple[str, ...] = ()
    passed_over: Counter[str] = field(default_factory=Counter)


def find_images(root: Path) -> ImageFolder:
    """The images of a folder's visible sub-folders, its classes; where those hold none, the images of the folder."""
    passed_over: Counter[str] = Counter()
    beside = _images(root, passed_over)
    folders = _folders(root, passed_over)
    inside: Counter[str] = Counter()
    found = [file for folder in folders for file in _images(folder, inside)]
    for folder in folders:
        for below in _folders(folder, inside):
            inside["in folders inside a class folder"] += _visible_below(below, inside)
    passed_over += inside
    if not found:
        return ImageFolder(beside, (), passed_over)
    passed_over["beside the class folders"] += len(beside)
    return ImageFolder(found, tuple(folder.name for folder in folders), +passed_over)


def unlisted(root: Path, listed: list[Path], table: str) -> Counter[str]:
    """The visible images below a folder that its table (metadata.jsonl) does not list."""
    known = {file.resolve() for file in listed}
    others = (path for path in _below(root) if path.suffix.lower() in SUFFIXES)
    return +Counter({f"not in {table}": sum(path.resolve() not in known for path in others)})


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is a system's or a tool's own, and no data."""
    return path.name.startswith(".") or path.name in _OF_SYSTEMS


def passed_over_line(passed_over: Counter[str]) -> str:
    """How many files were passed over, and why; empty where there were none."""
    if not passed_over:
        return ""
    reasons = [f"{count:,} {reason}" for reason, count in passed_over.most_common(_SHOWN)]
    more = ", ..." if len(passed_over) > _SHOWN else ""
    count = sum(passed_over.values())
    return f"; {count:,} file{'s' * (count != 1)} passed over: {', '.join(reasons)}{more}"


def some_of(lines: list[str]) -> str:
    """A list in one line, shortened in its middle where it is long."""
    if len(lines) <= _SHOWN:
        return ", ".join(lines)
    return ", ".join([*lines[: _SHOWN - 1], "...", lines[-1]])


def _images(folder: Path, passed_over: Counter[str]) -> list[Path]:
    """The images that lie in a folder itself."""
    images = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            continue
        if is_hidden(path):
            passed_over["hidden"] += 1
        elif path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            passed_over[path.suffix.lower() or "without a suffix"] += 1
    return images


def _folders(folder: Path, passed_over: Counter[str]) -> list[Path]:
    """The visible folders in a folder, by name; the files of the others are counted."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    passed_over["hidden"] += sum(len(_files_of(path)) for path in folders if is_hidden(path))
    return [path for path in folders if not is_hidden(path)]


def _visible_below(folder: Path, passed_over: Counter[str]) -> int:
    """How many visible files lie anywhere below a folder; the hidden ones are counted as such."""
    visible = len(list(_below(folder)))
    passed_over["hidden"] += len(_files_of(folder)) - visible
    return visible


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in _files_of(folder) if not any(map(is_hidden, _parts_below(folder, path))))


def _parts_below(folder: Path, path: Path) -> list[Path]:
    return [Path(part) for part in path.relative_to(folder).parts]


def _files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]
