"""The prompts of benchmarks, read from the files that their authors publish."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, one_line
from fewstep.reading import misfit, parse_json, read_json

#: OneIG-Bench's categories, and the folders that its readers look into.
ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark.

    key: what its reader calls the prompt's pictures, a relative path without suffix. record: all that its file says.
    """

    key: str
    prompt: str
    record: Mapping[str, Any] = field(default_factory=dict)


def read_items(kind: str, path: Path) -> list[Item]:
    """The prompts of a benchmark in its own order.

    Args:
        kind: ``geneval``, ``geneval2``, ``dpg``, ``oneig`` or ``imagereward``.
        path: GenEval's ``evaluation_metadata.jsonl``, GenEval 2's ``geneval2_data.jsonl``, DPG-Bench's folder of
            prompts or its ``dpg_bench.csv``, ``OneIG-Bench.csv``, ImageReward's ``benchmark-prompts.json``.

    Raises:
        UserError: it cannot be read, or is another file.
    """
    if kind not in _READERS:
        raise UserError(f"no prompts belong to {kind!r}: there are {', '.join(_READERS)}")
    try:
        items = _READERS[kind](path)
    except OSError as error:
        raise UserError(f"the prompts of {kind} cannot be read from {path}: {one_line(error)}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} does not hold the prompts of {kind}: {one_line(error)}") from error
    if not items:
        raise UserError(f"{path} holds no prompt of {kind}")
    ((key, times),) = Counter(item.key for item in items).most_common(1)
    if times > 1:
        raise UserError(f"{path} has {key} {times} times")
    return items


def _geneval(path: Path) -> list[Item]:
    """One table a line; the folder of a prompt is its line's number."""
    records = _lines_of_json(path, {"prompt": str, "tag": str})
    return [Item(f"{i:05d}", record["prompt"], record) for i, record in enumerate(records)]


def _geneval2(path: Path) -> list[Item]:
    records = _lines_of_json(path, {"prompt": str, "vqa_list": list})
    return [Item(f"{i:05d}", record["prompt"], record) for i, record in enumerate(records)]


def _dpg(path: Path) -> list[Item]:
    """A folder with a text file for each prompt, or the table of questions, in which a prompt has several lines."""
    if path.is_dir():
        return [Item(_name(file.stem), _text(file).strip()) for file in sorted(path.glob("*.txt"))]
    rows = _table(path, ("item_id", "text"))
    prompts = {row["item_id"]: row["text"] for row in rows}
    return [Item(_name(key), prompt.strip()) for key, prompt in prompts.items()]


def _oneig(path: Path) -> list[Item]:
    rows = _table(path, ("category", "id"))
    column = next((name for name in ("prompt_en", "prompt_cn") if rows and name in rows[0]), None)
    if rows and column is None:
        raise ValueError("it has no column prompt_en or prompt_cn")
    unknown = sorted({row["category"] for row in rows} - ONEIG_FOLDERS.keys())
    if unknown:
        raise ValueError(f"its category {unknown[0]!r} has no folder")
    return [Item(f"{ONEIG_FOLDERS[row['category']]}/{_name(row['id'])}", row[str(column)], row) for row in rows]


def _imagereward(path: Path) -> list[Item]:
    records = read_json(path)
    return [
        Item(_name(record["id"]), record["prompt"], record) for record in _checked(records, {"id": str, "prompt": str})
    ]


_READERS: Mapping[str, Callable[[Path], list[Item]]] = {
    "geneval": _geneval,
    "geneval2": _geneval2,
    "dpg": _dpg,
    "oneig": _oneig,
    "imagereward": _imagereward,
}


def _lines_of_json(path: Path, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    return _checked([parse_json(line) for line in _text(path).split("\n") if line.strip()], kinds)


def _checked(records: Any, kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    if not isinstance(records, list):
        raise ValueError("it is no list")
    for number, record in enumerate(records, 1):
        if (wrong := misfit(record, kinds)) is not None:
            raise ValueError(f"prompt {number}: {wrong}")
    return records


def _table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(_text(path)), strict=True))
    for row in rows:
        if None in row or None in row.values():
            raise ValueError("a line has another number of columns than the first")
    missing = [name for name in columns if rows and name not in rows[0]]
    if missing:
        raise ValueError(f"it has no column {missing[0]}")
    return rows


def _name(text: str) -> str:
    """A key as the name of a file; ValueError where it would be none."""
    if not text or text in (".", "..") or any(c in text for c in "/\\\0"):
        raise ValueError(f"{text!r} can be no file's name")
    return text


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")
