"""The pictures of a report's rows as parts of one page, reduced until all of them together are small enough."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fewstep.data.image_opening import UNREADABLE, opened, upright

#: Bytes that all pictures of a page take together, as text.
BUDGET = 12 * 2**20
#: The longest side that a picture may have, tried from the first on.
SIDES = (768, 512, 384, 256, 192, 128, 64)
#: Pictures by which it is judged at which side all of them will fit.
SAMPLED = 8
#: Up to this side a picture stays as it is.
LARGEST_PNG = 192
#: A picture of so few pixels is shown by whole pixels.
SMALL = 96
#: A file of more pixels is left out: opening it could fill the memory.
MOST_PIXELS = 2**26


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its size in pixels."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether it is shown enlarged, without smoothing."""
        return max(self.width, self.height) <= SMALL

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width, as the contact sheet of a video does."""
        return self.width > 2 * self.height


@dataclass(frozen=True)
class Embedded:
    """rows: the pictures of each row, None where a file could not be read. notes: what was reduced or left out."""

    rows: list[list[Picture | None]]
    notes: list[str]

    @property
    def columns(self) -> int:
        """Of the row with the most pictures."""
        return max(map(len, self.rows), default=0)

    @property
    def size(self) -> int:
        """Bytes that they take, as text."""
        return sum(len(picture.uri) for row in self.rows for picture in row if picture is not None)


def embed(folder: Path, rows: Sequence[Sequence[str]], budget: int = BUDGET) -> Embedded:
    """Read the pictures of all rows, as large as the budget allows.

    Args:
        folder: that the paths are relative to; nothing outside it is read.
        rows: paths of PNG files.
        budget: bytes of all pictures together, as text.
    """
    missing = [name for names in rows for name in names if _open(folder, name, pixels=False) is None]
    notes = []
    if missing:
        notes.append(f"{len(missing)} picture{'s are' if len(missing) > 1 else ' is'} missing, such as {missing[0]}.")
    most = columns = max(map(len, rows), default=0)
    while True:
        shown = [names[:columns] for names in rows]
        for side in _likely(folder, [name for names in shown for name in names], budget):
            made, fits, reduced = _encode(folder, shown, side, budget)
            if not fits:
                continue
            if reduced:
                notes.append(f"Pictures are reduced to {side} pixels and to JPEG here; the files beside it are whole.")
            if columns < most:
                notes.append(f"Only the first {columns} of {most} pictures of each row have room here.")
            return Embedded(made, notes)
        columns //= 2


def _likely(folder: Path, names: Sequence[str], budget: int) -> tuple[int, ...]:
    """The sides to try: from that on at which some of the pictures say that all will fit."""
    some = [image for name in names[:: max(1, len(names) // SAMPLED)] if (image := _open(folder, name)) is not None]
    for place, side in enumerate(SIDES):
        size = sum(len(_picture(image, side)[0].uri) for image in some)
        if size * len(names) <= budget * len(some):
            return SIDES[place:]
    return SIDES[-1:]


def _encode(
    folder: Path, rows: Sequence[Sequence[str]], side: int, budget: int
) -> tuple[list[list[Picture | None]], bool, bool]:
    """Pictures of at most `side` pixels; whether they fit the budget (else they end early); whether any is reduced."""
    made: list[list[Picture | None]] = []
    size, reduced = 0, False
    for names in rows:
        made.append([])
        for name in names:
            image = _open(folder, name)
            if image is None:
                made[-1].append(None)
                continue
            picture, smaller = _picture(image, side)
            made[-1].append(picture)
            size, reduced = size + len(picture.uri), reduced or smaller
            if size > budget:
                return made, False, reduced
    return made, True, reduced


def _picture(image: Image.Image, side: int) -> tuple[Picture, bool]:
    """A small picture as it is, a large one as JPEG; whether it lost anything."""
    whole = max(image.size) <= min(side, LARGEST_PNG)
    file = io.BytesIO()
    if whole:
        image.save(file, format="PNG", optimize=True)
    else:
        image = image.convert("RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=90, subsampling=0)
    kind = "png" if whole else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Picture(uri, *image.size), not whole


def readable(folder: Path, name: str) -> Path | None:
    """Where a picture lies, if it is one and lies inside the folder; a link may lead out of it."""
    return (folder / name).resolve() if _open(folder, name, pixels=False) is not None else None


def _open(folder: Path, name: str, *, pixels: bool = True) -> Image.Image | None:
    """A picture inside the folder, or None where there is none that can be read."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        with opened(path, pixels=False) as image:
            if image.width * image.height > MOST_PIXELS:
                return None
            return upright(image).convert("L" if image.mode in ("1", "L") else "RGB") if pixels else image
    except UNREADABLE:
        return None
