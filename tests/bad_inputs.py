"""Bad inputs for every command, made by the dozen: of each setting, of each file that is read, of each name of a path.

A :class:`Bad` is words of a command line, or a call from Python, and what makes its files. Nothing here is harmful to
any program: files are cut short, altered, or claim of themselves what is not so.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fewstep.config.pairs import PairsConfig
from fewstep.programs.methods import method_class, methods

#: What a file may turn out to hold in the place of a JSON table.
NO_TABLES = {
    "empty": b"",
    "cut short": b'{"a": 1, "b',
    "binary": bytes(range(256)),
    "in another encoding": '{"a": "café"}'.encode("latin-1"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"text"',
    "nested too deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "with a name twice": b'{"call": {}, "call": {}}',
}
NO_YAML = {
    "empty": b"",
    "cut short": b"steps: [1, ",
    "binary": bytes(range(256)),
    "in another encoding": "negative_prompt: café".encode("latin-1"),
    "a list": b"[1, 2]",
    "a number": b"3",
    "nested too deep": b"steps: " + b"[" * 2000 + b"]" * 2000,
    "with a name twice": b"steps: 2\nsteps: 3\n",
    "with an object of Python": b"steps: !!python/object/apply:os.getcwd []\n",
    "with a name of Python": b"steps: !!python/name:os.getcwd\n",
    "with an alias of itself": b"call: &a {x: *a}\n",
    "with aliases that grow": b"call:\n a: &a [1,1,1,1,1,1]\n b: &b [*a,*a,*a,*a,*a,*a,*a]\n c: [*b,*b,*b,*b,*b,*b]\n",
    "with a tab": b"steps:\n\t2",
    "of two documents": b"steps: 2\n---\nsteps: 3\n",
}


def tensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header; ``length``: what it says of the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


#: What a file may turn out to hold in the place of tensors.
NO_TENSORS = {
    "empty": b"",
    "of a few bytes": b"abc",
    "a text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "whose header is longer than the file": tensors_file(_one(), bytes(8), length=2**40),
    "whose header has the largest length": tensors_file(_one(), bytes(8), length=2**64 - 1),
    "whose header is no JSON": tensors_file(b"{" * 16, bytes(8)),
    "whose header is a list": tensors_file([], bytes(8)),
    "cut short": tensors_file(_one(), bytes(4)),
    "with bytes that belong to nothing": tensors_file(_one(), bytes(64)),
    "whose tensors overlap": tensors_file({**_one(), "v": _one()["w"]}, bytes(8)),
    "whose offsets run backwards": tensors_file(_one(data_offsets=[8, 0]), bytes(8)),
    "whose shape is no number": tensors_file(
        b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "whose shape is negative": tensors_file(_one(shape=[-2]), bytes(8)),
    "whose shape overflows": tensors_file(_one(shape=[2**62, 2**62]), bytes(8)),
    "of an unknown dtype": tensors_file(_one(dtype="F33"), bytes(8)),
    "that has other tensors": tensors_file(_one(), bytes(8)),
}


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        name: of the test.
        words: of the command line, with {case} for a folder of its own and {place} for that of the good inputs.
        says: a part of the one line that has to come.
        make: makes its files, of the folder of the case and that of the good inputs.
        call: what is called from Python in the place of a command, of the same two.
    """

    name: str
    words: tuple[str, ...] = ()
    says: str = ""
    make: Callable[[Path, Path], object] = lambda case, place: None
    call: Callable[[Path, Path], object] | None = None


def spoilt(source: str, file: str, content: bytes | None) -> Callable[[Path, Path], None]:
    """Makes {case}/x, a copy of {place}/source in which one file is missing, or holds something else."""

    def make(case: Path, place: Path) -> None:
        copied(place / source, case / "x")
        (case / "x" / file).unlink()
        if content is not None:
            (case / "x" / file).write_bytes(content)

    return make


def edited(source: str, file: str, change: Callable[[Any], Any]) -> Callable[[Path, Path], None]:
    """Makes {case}/x, a copy of {place}/source in which a JSON file holds something else."""

    def make(case: Path, place: Path) -> None:
        text = json.dumps(change(json.loads((place / source / file).read_text(encoding="utf-8"))))
        spoilt(source, file, text.encode())(case, place)

    return make


def copied(source: Path, target: Path) -> None:
    """A copy whose files are the same ones: only whole files are exchanged in it."""
    shutil.copytree(source, target, copy_function=os.link)


# --- settings ---------------------------------------------------------------------------------------------------

#: By the type of a setting: texts that are none of its values.
_NO_VALUES = {
    int: ("many", "1" + "0" * 30),
    float: ("nan", "1e400"),
    bool: ("perhaps",),
    dict: ("[1]", "{"),
    list: ("3",),
    str: (),
}
#: Settings of which one command line is enough for all methods, or whose bad values are told by other tests.
_COMMON = ("distill", "dmd2", "--teacher", "{place}/ddim", "--out", "{case}/out", "--cpu", "--report_to", "none")


def settings() -> Iterator[Bad]:
    """A value of another type, and one that is out of all bounds, for every setting of every method and of pairs."""
    seen: set[tuple[str, type]] = set()
    groups = [(("distill", method), method_class(method).Config) for method in methods()]
    for command, kind in [*groups, (("pairs",), PairsConfig)]:
        hints = get_type_hints(kind)
        for field in fields(kind):
            plain = plain_type(hints[field.name])
            if (field.name, plain) in seen:
                continue
            seen.add((field.name, plain))
            texts = [
                *_NO_VALUES[plain],
                *(("null",) if plain in (int, float, bool) and not optional(hints[field.name]) else ()),
            ]
            for number, text in enumerate(texts):
                if number and command == ("pairs",):
                    continue
                words = (*command, "--teacher", "{place}/ddim", "--out", "{case}/out", f"--{field.name}={text}")
                words += ("--num", "2") if command == ("pairs",) and field.name != "num" else ()
                yield Bad(f"{command[-1]} --{field.name}={text}", words, f"--{field.name}")


def negative_settings() -> Iterator[Bad]:
    """A negative number for every setting whose default is none."""
    for method in methods():
        kind = method_class(method).Config
        for field in fields(kind):
            counts = field.type in ("int", int) and isinstance(field.default, int)
            own = method == "dmd2" or field.name not in {f.name for f in fields(method_class("dmd2").Config)}
            if counts and own:
                words = ("distill", method, "--teacher", "{place}/ddim", "--out", "{case}/out", f"--{field.name}=-1")
                yield Bad(f"{method} --{field.name}=-1", words, f"--{field.name}")


def plain_type(hint: Any) -> type:
    """``int`` of ``int | None``, ``dict`` of ``dict[str, Any]``."""
    kinds = [
        kind for kind in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if kind is not type(None)
    ]
    return getattr(kinds[0], "__origin__", kinds[0])


def optional(hint: Any) -> bool:
    """Whether a setting may be null."""
    return isinstance(hint, types.UnionType) and type(None) in get_args(hint)
