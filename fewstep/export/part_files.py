"""The files of one part in a pipeline's folder: those that a stock load reads, under the names that it looks for."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from torch import nn

from fewstep.reading import read_json

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
#: What settings, vocabularies and templates are written in. Weights are safetensors, or the part is not copied.
_TEXTS = frozenset({".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".tiktoken"})
#: The index of weights in several files, as its name and content, and the files by the names that they get.
WeightFiles = tuple[tuple[str, bytes] | None, dict[str, Path]]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def part_folders(pipeline: DiffusionPipeline, name: str) -> list[Path]:
    """The folders in which a part of a pipeline may lie on this machine, the likeliest first; none where there is none.

    A part says where it was loaded from. One that does not (an image processor) lies beside those that do. What was
    fetched from the hub lies in its cache.
    """
    sources = [_source(part) for part in pipeline.components.values() if part is not None]
    roots = [_source(pipeline), *(source.parent for source in sources if source is not None)]
    own = _source(getattr(pipeline, name))
    beside = [root / name for root in roots if root is not None and (root / INDEX).is_file()]
    folders = [folder for folder in (own, *beside, own / name if own is not None else None) if folder is not None]
    return [f for f in dict.fromkeys(folders) if f.is_dir() and not (f / INDEX).is_file()]


def _source(part: Any) -> Path | None:
    """Where a part says that it was loaded from."""
    config = getattr(part, "config", None)
    named = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    named = named or getattr(part, "name_or_path", None)
    return Path(named) if isinstance(named, str) and named else None


def copies_of(part: Any, source: Path, target: Path) -> Iterator[Path]:
    """Copy a part's files to ``target``, once for each set of weights in ``source``; ``target`` is empty each time.

    Contents are equal to the byte. Names, and the index of weights in several files, lose the suffix of a variant
    (``.fp16``): stock diffusers looks for it only when it is told. A folder with code of its own gives none, and one
    whose weights are no safetensors neither.

    Args:
        part: a network, a tokenizer, a processor.
        source: its folder.
        target: a folder that is made anew.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if any(path.suffix == ".py" for path in files):
        return
    texts = [path for path in files if path.suffix in _TEXTS and ".index." not in path.name]
    for index, weights in _weights(part, source) if isinstance(part, nn.Module) else [(None, {})]:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in texts:
            shutil.copyfile(path, target / path.name)
        for name, path in weights.items():
            shutil.copyfile(path, target / name)
        if index is not None:
            (target / index[0]).write_bytes(index[1])
        yield target


def _weights(part: nn.Module, source: Path) -> Iterator[WeightFiles]:
    """The complete sets of weights in a folder: an index, and files by their new names.

    Where there are several, the one that takes as many bytes as the part in memory is the likeliest, and comes first.
    """
    size = sum(p.numel() * p.element_size() for p in part.parameters())
    found = list(_sets(_stem(part), source))
    yield from sorted(found, key=lambda one: abs(sum(path.stat().st_size for path in one[1].values()) - size))


def _sets(stem: str, source: Path) -> Iterator[WeightFiles]:
    for variant in _variants(stem, source):
        index = source / (f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json")
        whole = source / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
        if index.is_file():
            try:
                content = read_json(index)
                renamed = {name: _without(variant, _plain(name)) for name in content["weight_map"].values()}
                files = {new: source / old for old, new in renamed.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.debug("%s is no index of weights that can be copied (%s)", index, error)
                continue
            content["weight_map"] = {key: renamed[name] for key, name in content["weight_map"].items()}
            written = json.dumps(content, indent=2).encode() + b"\n" if variant else index.read_bytes()
            if all(path.is_file() for path in files.values()):
                yield (f"{stem}.safetensors.index.json", written), files
        elif whole.is_file():
            yield None, {f"{stem}.safetensors": whole}


def _plain(name: Any) -> str:
    """The name of a file in the same folder. Raises ``ValueError`` for any other, which would lead out of the copy."""
    if not isinstance(name, str) or PurePath(name).name != name:
        raise ValueError(f"{name!r} is no file in this folder")
    return name


def _stem(part: nn.Module) -> str:
    return "diffusion_pytorch_model" if isinstance(part, ModelMixin) else "model"


def _variants(stem: str, source: Path) -> list[str]:
    """The variants that a folder has weights of; "" are those without a suffix."""
    names = [path.name for path in source.iterdir()]
    patterns = [rf"{stem}(?:\.([^.]+))?\.safetensors", rf"{stem}\.safetensors\.index(?:\.([^.]+))?\.json"]
    found = [re.fullmatch(pattern, name) for pattern in patterns for name in names]
    return sorted({match[1] or "" for match in found if match})


def _without(variant: str, name: str) -> str:
    """``model.fp16-00001-of-00002.safetensors``, or in the older form ``model-00001-of-00002.fp16.safetensors``."""
    return re.sub(rf"\.{re.escape(variant)}(?=-\d+-of-\d+\.|\.safetensors$)", "", name) if variant else name


def stored_dtypes(pipeline: DiffusionPipeline, name: str) -> dict[str, torch.dtype]:
    """The dtype of each tensor in the files of a network, by its name there; empty where it has no files.

    Of several variants it is the one that takes as many bytes as the network in memory. What is in fewer bits than 16
    is nothing to write a trained network in, and is left out.
    """
    for folder in part_folders(pipeline, name):
        for _, files in _weights(getattr(pipeline, name), folder):
            found: dict[str, torch.dtype] = {}
            for path in files.values():
                with safe_open(path, framework="pt") as file:
                    kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
                found |= {key: _DTYPES[kind] for key, kind in kinds.items() if kind in _DTYPES}
            return found
    return {}
