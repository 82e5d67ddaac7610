"""The same few captioned images as a folder, as WebDataset shards and as parquet, for tests that compare them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CAPTIONS = ("a cat", "a dog", "ein Dach", "a tree", "a cat", "two boats", "eine Tür")


def jpeg(number: int, size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (2, 3, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(content, "jpeg")
    return content.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """An archive of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, value in members.items():
            content = value.encode() if isinstance(value, str) else value
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], rows_in_a_group: int = 2) -> Path:
    """A parquet file of these columns; the test is skipped without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(dict(columns)), path, row_group_size=rows_in_a_group)
    return path


def two_samples(shard: Path, **changed: bytes | str | None) -> Path:
    """A shard of two samples, with members changed, added or (None) left out."""
    members: dict[str, bytes | str] = {"a.jpg": jpeg(0), "a.txt": "one", "b.jpg": jpeg(1), "b.txt": "two"}
    members |= {name.replace("_", "."): value for name, value in changed.items() if value is not None}
    for name in changed:
        if changed[name] is None:
            del members[name.replace("_", ".")]
    return write_tar(shard, members)


def folder_with_a_table(root: Path) -> Path:
    root.mkdir()
    for k, caption in enumerate(CAPTIONS):
        (root / f"{k:04}.jpg").write_bytes(jpeg(k))
        with (root / "metadata.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file_name": f"{k:04}.jpg", "text": caption, "label": k % 3}) + "\n")
    return root


def folder_with_csv(root: Path) -> Path:
    root.mkdir()
    lines = ["file_name,text,label", *(f'{k:04}.jpg,"{caption}",{k % 3}' for k, caption in enumerate(CAPTIONS))]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for k in range(len(CAPTIONS)):
        (root / f"{k:04}.jpg").write_bytes(jpeg(k))
    return root


def folder_of_pairs(root: Path) -> Path:
    root.mkdir()
    for k, caption in enumerate(CAPTIONS):
        (root / f"{k:04}.jpg").write_bytes(jpeg(k))
        (root / f"{k:04}.txt").write_text(caption + "\n", encoding="utf-8")
    return root


def tars(root: Path) -> Path:
    """Two shards, of which the first has more."""
    for shard, numbers in enumerate((range(4), range(4, len(CAPTIONS)))):
        members: dict[str, bytes | str] = {}
        for k in numbers:
            members |= {f"{k:04}.jpg": jpeg(k), f"{k:04}.txt": CAPTIONS[k], f"{k:04}.cls": str(k % 3)}
        write_tar(root / f"shard-{shard:05}.tar", members)
    return root


def parquets(root: Path) -> Path:
    """Two files as ``datasets`` writes them."""
    for shard, numbers in enumerate((range(4), range(4, len(CAPTIONS)))):
        columns = {
            "image": [{"bytes": jpeg(k), "path": f"{k:04}.jpg"} for k in numbers],
            "text": [CAPTIONS[k] for k in numbers],
            "label": [k % 3 for k in numbers],
        }
        write_parquet(root / f"train-{shard:05}-of-00002.parquet", columns)
    return root


#: Every form that has texts, by its name.
FORMS: dict[str, Callable[[Path], Path]] = {
    "metadata.jsonl": folder_with_a_table,
    "metadata.csv": folder_with_csv,
    "texts beside": folder_of_pairs,
    "tar": tars,
    "parquet": parquets,
}
