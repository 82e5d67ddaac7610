"""Parts that were not trained: copied from the teacher's folder, file by file, where that gives what is in memory.

What ``save_pretrained`` of one version of transformers writes, an older one may not read: version 5 saves a tokenizer
as ``tokenizer.json`` alone. The teacher's own files are read by all that read the teacher. And they hold a
half-precision teacher in half precision, though it was loaded in float32.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.data.fingerprint import part_digest
from fewstep.errors import first_line
from fewstep.export.part_files import copies_of, part_folders
from fewstep.recording.pipeline import with_parts

logger = logging.getLogger(__name__)


def save_pipeline(pipeline: DiffusionPipeline, folder: Path, own: Iterable[str]) -> None:
    """``save_pretrained``, with the parts that are still what lies in the folder of each copied from there.

    Whether a part is still that is proved: its copy is loaded and compared, to the bit. So one in which a LoRA is
    fused, whose vocabulary has grown, that is quantised, or that comes from no folder, is saved as it is in memory.

    Args:
        pipeline: of the student; it stays as it is.
        folder: to write to.
        own: names of the parts that are the student's own, and are saved as they are in memory.
    """
    kept = set(own)
    parts = {n: p for n, p in pipeline.components.items() if n not in kept and hasattr(p, "save_pretrained")}
    copied = {name: _stand_in(part) for name, part in parts.items() if _copied(pipeline, name, folder / name)}
    with_parts(pipeline, **copied).save_pretrained(folder, safe_serialization=True)


def _copied(pipeline: DiffusionPipeline, name: str, target: Path) -> bool:
    """Copy a part's files to ``target`` where they are what is in memory; else nothing is there."""
    part = getattr(pipeline, name)
    for source in part_folders(pipeline, name):
        for copied in copies_of(part, source, target):
            if _gives(part, copied):
                return True
    shutil.rmtree(target, ignore_errors=True)
    return False


def _stand_in(part: Any) -> Any:
    """The part as the pipeline shall list it, whose files are written already."""

    def save_pretrained(_folder: str, **_how: Any) -> None:
        """Writes nothing: the files were copied."""

    listed = copy.copy(part)
    listed.save_pretrained = save_pretrained
    return listed


def _gives(part: Any, folder: Path) -> bool:
    """Whether loading a folder gives what a part is in memory, to the bit."""
    dtype = {"dtype": part.dtype} if isinstance(part, nn.Module) else {}
    try:
        loaded = type(part).from_pretrained(folder, **dtype)
    except Exception as error:  # each library that reads a part of a pipeline has exceptions of its own
        logger.debug("%s is saved from memory: its files do not load (%s)", type(part).__name__, first_line(error))
        return False
    if not isinstance(part, nn.Module):
        return part_digest(part) == part_digest(loaded)
    return _settings(part) == _settings(loaded) and _same_weights(part.state_dict(), loaded.state_dict())


def _settings(network: Any) -> dict[str, Any]:
    """The configuration of a network, without where it came from and in which dtype it was loaded."""
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("dtype", "torch_dtype")}


def _same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states hold the same numbers; the first's dtypes count, which a caller may have mixed."""
    return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())


def _same(value: Any, loaded: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(loaded, Tensor):
        return bool(value == loaded)
    if value.shape != loaded.shape:
        return False
    return torch.equal(value.detach().cpu(), loaded.detach().to("cpu", value.dtype))
