"""Rows of the tensors in a safetensors file, each read from the disk when it is asked for.

safetensors maps a file into memory, where whatever was read once counts as the process's own until the file is closed:
a run that has seen each item of a cache would hold all of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import UserError
from fewstep.reading import parse_json

_LENGTH = 8  # bytes at the beginning of a file, which say how long its table of contents is


class TensorRows:
    """Some of a file's tensors, of which :meth:`row` gives one row.

    Args:
        path: of the file.
        names: of the tensors.

    Raises:
        OSError: the file cannot be read; SafetensorError: it is none, or lacks a tensor.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path, self._file = path, path.open("rb", buffering=0)
        length = int.from_bytes(self._bytes(0, _LENGTH), "little")
        with safe_open(str(path), framework="pt") as checked:  # offsets in a file that it takes lead nowhere else
            dtypes = {name: checked.get_slice(name)[:0].dtype for name in names}
            content = parse_json(self._bytes(_LENGTH, length).decode())
        self._places = {
            name: (dtype, content[name]["shape"][1:], _LENGTH + length + content[name]["data_offsets"][0])
            for name, dtype in dtypes.items()
        }

    def row(self, name: str, number: int) -> Tensor:
        """Row ``number`` of a tensor (rows, ...): (...), a tensor of its own.

        Raises:
            UserError: the file cannot be read any more.
        """
        dtype, shape, begin = self._places[name]
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        try:
            content = self._bytes(begin + number * size, size)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read any more: {error}") from error
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _bytes(self, begin: int, size: int) -> bytearray:
        """A part of the file; several threads may ask at a time."""
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size:
            if not (count := os.preadv(self._file.fileno(), [view[done:]], begin + done)):
                raise OSError(f"{self._path.name} ends before byte {begin + size}")
            done += count
        return content
