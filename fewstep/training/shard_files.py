"""Tensors that lie divided over processes, in safetensors files: each process writes and reads its own parts.

Layout and planning are those of ``torch.distributed.checkpoint``, in its Hugging Face storage, which keeps where a part
belongs in the header of its file: nothing is pickled, and any number of processes puts the parts together again. That
storage is younger than the oldest torch that is admitted, and is imported when it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.errors import one_line

#: Makes the tensor that a stored one is read into: (stem, name, shape, dtype) -> whole, or a DTensor.
Empty = Callable[[str, str, torch.Size, torch.dtype], Tensor]


def whole(_stem: str, _name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """An :data:`Empty` for those who want all of every tensor."""
    return torch.zeros(size, dtype=dtype)


def write(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write stem -> name -> tensor; every process calls it, with a DTensor's own part.

    Of what is no DTensor the first process's is written.

    Raises:
        OSError: a process could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = {f"{stem}/{name}": value.detach() for stem, values in tensors.items() for name, value in values.items()}
    seen: set[int] = set()
    for key, value in flat.items():  # a file cannot hold tensors that share memory, as tied weights do
        memory = (value.to_local() if isinstance(value, DTensor) else value).data_ptr()
        flat[key] = value.clone() if memory in seen else value
        seen.add(memory)
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), planner=planner)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise OSError(one_line(cause)) from error


def read(folder: Path, stems: Sequence[str], empty: Empty = whole) -> dict[str, dict[str, Tensor]]:
    """What :func:`write` was given, by however many processes; all of them call it where ``empty`` makes DTensors.

    Args:
        folder: that was written.
        stems: that it was written with; some may have no tensor.
        empty: makes what is read into.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    flat: dict[str, Tensor] = {}
    for key, about in stored.items():
        assert isinstance(about, TensorStorageMetadata)  # nothing else is written
        stem, _, name = key.partition("/")
        flat[key] = empty(stem, name, about.size, about.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        alone = empty is whole or not dist.is_initialized()
        load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    tensors: dict[str, dict[str, Tensor]] = {stem: {} for stem in stems}
    for key, value in flat.items():
        stem, _, name = key.partition("/")
        tensors[stem][name] = value
    return tensors
