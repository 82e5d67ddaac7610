"""Bad items for every command that takes some; see :mod:`tests.bad_inputs`.

All commands read items by one function, so that each kind goes through one command, taken in turn. What only the
pipeline itself finds wrong goes through one that records it, and `sample`, which calls it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.bad_files import TRAIN
from tests.bad_inputs import Bad
from tests.item_sets import picture

#: The words of each command for items of ``{case}/x``.
COMMANDS = {
    "distill": ("distill", "dmd2", "--teacher", "{teacher}", "--items", "{case}/x", "--out", "{case}/out", *TRAIN),
    "cache": ("cache", "--teacher", "{teacher}", "--items", "{case}/x", "--out", "{case}/out", "--cpu"),
    "plan": ("plan", "{teacher}", "dmd2", "--items", "{case}/x", "--cpu"),
    "probe": ("probe", "{teacher}", "--items", "{case}/x"),
    "sample": ("sample", "{teacher}", "--items", "{case}/x", "--steps", "2", "--out", "{case}/x.png"),
    "eval": (
        "eval",
        "--teacher",
        "{teacher}",
        "--teacher_steps",
        "1",
        "--items",
        "{case}/x",
        "--cpu",
        "--num",
        "2",
        "--metrics",
        "saturation",
        "--out",
        "{case}/out",
    ),
}
ONE, TWO = {"prompt": "the a", "image": "0.png"}, {"prompt": "the b", "image": "1.png"}
HOLE = {"mask_image": "mask.png"}

#: By kind: the teacher, two rows, and a part of the line; each is found while the rows are read.
READ: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "a picture that is missing": (
        "editor",
        [ONE, {**TWO, "image": "none.png"}],
        "row 2 of items.jsonl: image: there is no",
    ),
    "a text for a picture": (
        "editor",
        [ONE, {**TWO, "image": "text.png"}],
        r"row 2 .*text.png is no .*of no known format",
    ),
    "a picture that is cut short": ("editor", [ONE, {**TWO, "image": "cut.png"}], "row 2 .*cut.png is no picture"),
    "an animation": ("editor", [ONE, {**TWO, "image": "moving.gif"}], "row 2 .*is an animation"),
    "a list of nothing": ("editor", [ONE, {**TWO, "image": []}], "row 2 .*the list is empty"),
    "a column that is none": ("editor", [ONE, {**TWO, "style": "x"}], "row 2 .* has the column style"),
    "a size that is no argument": ("editor", [ONE, {**TWO, "height": 33}], "row 2 .* has the column height"),
    "no prompt": ("editor", [ONE, {"image": "1.png"}], "row 2 .* has no prompt"),
    "other arguments": ("editor", [ONE, {"prompt": "the b"}], "row 2 .* has no image, unlike row 1"),
    "a mask that is missing": (
        "filler",
        [{**ONE, **HOLE}, {**TWO, "mask_image": "none.png"}],
        "row 2 .*there is no file",
    ),
    "a mask in one row alone": ("filler", [{**ONE, **HOLE}, TWO], "row 2 .* has no mask_image, unlike row 1"),
    "a mask of another size": ("filler", [{**ONE, **HOLE}, {**TWO, "mask_image": "small.png"}], "row 2 .*8x16 pixels"),
    "a black mask": ("filler", [{**ONE, **HOLE}, {**TWO, "mask_image": "black.png"}], "row 2 .*is all black"),
}
#: The same of what is wrong with all rows together, or what only the pipeline says; not found where one is sampled.
RECORDED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "rows that do not differ": ("editor", [ONE, {**TWO, "image": "0.png"}], "no two rows have different pictures"),
    "one row": ("editor", [ONE], "no two rows have different pictures"),
}
#: What only the pipeline finds wrong, with the row that it was run for.
CALLED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "two pictures where one is meant": (
        "editor",
        [{**ONE, "image": ["0.png", "1.png"]}, {**TWO, "image": ["1.png", "0.png"]}],
        "row [12] of items.jsonl.*Sizes of",
    ),
    "no mask": ("filler", [ONE, TWO], "row [12] of items.jsonl.*incorrect format"),
    "a size that the teacher refuses": (
        "filler",
        [{**ONE, **HOLE, "height": 33, "width": 16}, {**TWO, **HOLE, "height": 33, "width": 16}],
        "row [12] of items.jsonl.*divisible by 8",
    ),
    "a strength that makes no step": (
        "filler",
        [{**ONE, **HOLE, "strength": 0.0}, {**TWO, **HOLE, "strength": 0.0}],
        "row [12] of items.jsonl.*strength",
    ),
}


def items() -> Iterator[Bad]:
    """Every kind, through one command or two."""
    for (kind, one), command in zip(READ.items(), itertools.cycle(COMMANDS), strict=False):
        yield _bad(kind, command, *one)
    for (kind, one), command in zip(RECORDED.items(), ("plan", "distill"), strict=True):
        yield _bad(kind, command, *one)
    for (kind, one), pair in zip(
        CALLED.items(), itertools.cycle((("cache", "sample"), ("probe", "sample"))), strict=False
    ):
        for command in pair:
            yield _bad(kind, command, *one)
    words = ("probe", "{place}/editor", "--call", '{"image": "0.png"}')
    yield Bad("a picture in --call", words, "the call has image, and a picture is of one sample: give it by --items")


def _bad(kind: str, command: str, teacher: str, rows: list[dict[str, Any]], says: str) -> Bad:
    words = tuple(word.replace("{teacher}", "{place}/" + teacher) for word in COMMANDS[command])
    return Bad(f"{command} --items: {kind}", words, says, _made(rows))


def _made(rows: list[dict[str, Any]]) -> Callable[[Path, Path], None]:
    """Makes {case}/x with these rows, and pictures of all kinds."""

    def make(case: Path, place: Path) -> None:
        folder = case / "x"
        folder.mkdir()
        for number in range(2):
            picture(number).save(folder / f"{number}.png")
        content = (folder / "0.png").read_bytes()
        (folder / "cut.png").write_bytes(content[: len(content) // 2])
        (folder / "text.png").write_text("a text")
        picture(2).save(folder / "moving.gif", save_all=True, append_images=[picture(3)])
        hole = Image.new("L", (16, 16))
        hole.paste(255, (0, 0, 8, 8))
        hole.save(folder / "mask.png")
        Image.new("L", (8, 16), 255).save(folder / "small.png")
        Image.new("L", (16, 16)).save(folder / "black.png")
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make
