"""Many samples in a folder, in shards that any number of processes write and that are complete and checked, or absent.

``about.json`` says what all of the folder is. ``shard_000012.safetensors`` holds rows 12 S to 13 S - 1 of every tensor.
A shard carries the digest of its tensors and of what it is a shard of, so nobody has to keep a list of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.data.durable import json_sha256, write_durably
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.errors import UserError
from fewstep.reading import misfit, read_json

_ABOUT = "about.json"
_OPEN = 64  # shards at a time; each is a file and its table of contents, not its content


class Shards:
    """A folder of ``about["num"]`` rows, ``about["shard_size"]`` in a shard.

    Args:
        folder: made by :meth:`begin`, or found by :meth:`find`.
        about: what it is; JSON can hold it. ``format`` names what the tensors are.
        maker: the command that makes such folders, for messages.
        wanted: only so many rows, the first ones, need be there; more may follow in a later run. Default: all.
        again: what goes on with a folder that was begun.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        maker: str,
        wanted: int | None = None,
        again: str = "--resume",
    ) -> None:
        self.folder, self.about, self.maker, self.again = folder, about, maker, again
        self.count: int = about["num"] if wanted is None else wanted
        self._open_shard = functools.lru_cache(_OPEN)(self._open)

    @classmethod
    def begin(
        cls,
        folder: Path,
        about: dict[str, Any],
        maker: str,
        *,
        resume: bool,
        wanted: int | None = None,
        again: str = "--resume",
    ) -> Shards:
        """Start a folder, or go on with one that is about the very same.

        Raises:
            UserError: it cannot be made, holds something else, or is there already and ``resume`` is not set.
        """
        folder.mkdir(parents=True, exist_ok=True)
        shards = cls(folder, about, maker, wanted, again)
        others = [
            path for path in folder.iterdir() if path.suffix != ".partial" and path.name != INDEX_FOLDER
        ]  # before a second writer begins it
        if (folder / _ABOUT).exists():
            theirs = read_about(folder, about["format"], maker)
            if not resume:
                raise UserError(f"{folder} is begun already; add --resume to go on with it, or choose another --out")
            # What an earlier version did not write down cannot be compared; its shards are bound to what it wrote.
            if changed := sorted(name for name in theirs if about.get(name) != theirs[name]):
                raise UserError(f"{folder} was begun with another {', '.join(changed)}; choose another --out")
            return cls(folder, theirs, maker, wanted, again)
        if others:
            raise UserError(f"{folder} is not empty and holds nothing of {maker}; choose another --out")
        text = json.dumps({**about, "sha256": json_sha256(about)}, indent=1, ensure_ascii=False)
        # Independent processes may begin the same folder at the same moment; they write the same.
        partial = f".{_ABOUT}.{os.getpid()}.partial"
        write_durably(folder / _ABOUT, lambda path: path.write_text(text, encoding="utf-8"), partial)
        return shards

    @classmethod
    def find(cls, folder: Path, kind: str, maker: str, wanted: int | None = None) -> Shards:
        """A complete folder; all of it is read once and checked.

        Raises:
            UserError: there is none, or it is of another kind, not complete, or damaged; one line says what to do.
        """
        shards = cls(folder, read_about(folder, kind, maker), maker, wanted)
        for number in shards.numbers:
            if not shards.path(number).exists():
                raise UserError(f"{folder} is not complete: {shards.path(number).name} is missing; {shards._go_on}")
            if not shards.is_whole(number):
                raise UserError(f"{shards.path(number)} is truncated or damaged; {shards._go_on} to make it again")
        return shards

    @property
    def _go_on(self) -> str:
        return f"run {self.maker} with the same settings and --resume"

    @property
    def numbers(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.count // self.about["shard_size"]))

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        first = number * self.about["shard_size"]
        return range(first, min(first + self.about["shard_size"], self.count))

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard_{number:06d}.safetensors"

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard; every tensor has a row for each of :meth:`rows`.

        Raises:
            UserError: the disk is full or does not take it; complete shards are untouched.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # One entry: safetensors writes several in any order, and equal shards are to be equal files.
        metadata = {"sha256": self._digest_of(tensors)}
        try:
            write_durably(self.path(number), lambda path: save_file(tensors, path, metadata))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.path(number)} could not be written ({error}); make room on the disk, then {self.again}"
            ) from error

    def is_whole(self, number: int) -> bool:
        """Whether a shard is there with all its rows, belongs to this folder, and is what was written."""
        try:
            with safe_open(str(self.path(number)), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            return False
        rows = min(map(len, tensors.values()), default=0)
        return rows >= len(self.rows(number)) and metadata.get("sha256") == self._digest_of(tensors)

    def _digest_of(self, tensors: dict[str, Tensor]) -> str:
        """The SHA-256 of a shard's tensors and of what its folder is about."""
        state = hashlib.sha256(json_sha256(self.about).encode())
        for name, tensor in sorted(tensors.items()):
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()

    def shapes(self, number: int) -> dict[str, list[int]]:
        """The shapes of a shard's tensors, (rows, ...), by name."""
        file, names = self._open_shard(number)
        return {name: list(file.get_slice(name).get_shape()) for name in names}

    def column(self, number: int, name: str) -> Tensor:
        """All rows of one tensor of a shard, (rows, ...)."""
        file, _ = self._open_shard(number)
        whole: Tensor = file.get_tensor(name)
        return whole

    def row(self, index: int) -> dict[str, Tensor]:
        """One row of every tensor, read alone."""
        number, place = divmod(index, self.about["shard_size"])
        file, names = self._open_shard(number)
        return {name: file.get_slice(name)[place : place + 1][0] for name in names}

    def tensor(self, index: int, name: str) -> Tensor:
        """One row of one tensor, read alone."""
        number, place = divmod(index, self.about["shard_size"])
        return self._open_shard(number)[0].get_slice(name)[place : place + 1][0]

    def _open(self, number: int) -> tuple[Any, list[str]]:
        # Memory-mapped: what is asked for is read, and nothing else.
        file = safe_open(str(self.path(number)), framework="pt")
        return file, list(file.keys())


def begun_about(folder: Path) -> dict[str, Any]:
    """What a folder says that it is about, unchecked; nothing where it says nothing that can be read."""
    try:
        return dict(read_json(folder / _ABOUT))
    except (OSError, ValueError, TypeError):
        return {}


def read_about(folder: Path, kind: str, maker: str) -> dict[str, Any]:
    """What a folder is about.

    Raises:
        UserError: it holds no such thing, or one of another version, or the file is damaged.
    """
    try:
        about: dict[str, Any] = read_json(folder / _ABOUT)
        digest = about.pop("sha256")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} holds nothing of {maker}; make it with {maker} --out {folder}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / _ABOUT} cannot be read; make the folder again with {maker}") from error
    if about.get("format") != kind:
        raise UserError(f"{folder} holds {about.get('format')!r}, not {kind!r}; make it again with {maker}")
    # A digest can be made by anybody, so what follows from these is checked too.
    wrong = misfit(about, {"num": int, "shard_size": int}) or min(about["num"], about["shard_size"]) < 1
    if wrong or digest != json_sha256(about):
        raise UserError(f"{folder / _ABOUT} is not what was written; make the folder again with {maker}")
    return about
