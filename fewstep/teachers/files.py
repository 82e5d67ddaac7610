"""Which files a pipeline is made of, in a folder or in the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from fewstep.reading import read_json
from fewstep.teachers.names import teacher_folder
from fewstep.teachers.source import WEIGHTS

_INDEX = "model_index.json"
# The list of a component's weights in shards.
_LIST = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model\.(?P<format>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
#: What diffusers and transformers read of a component's folder; exports for other runtimes lie beside it.
_READ = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"})


def pipeline_place(name: str, revision: str | None = None, subfolder: str | None = None) -> Path | None:
    """Where a teacher lies on this machine, the hub's cache included; None for one that was not fetched yet.

    Args:
        name: a folder, a single file, a hub id, or an embedded teacher.
        revision: of the hub id.
        subfolder: of the folder or repository.
    """
    folder = teacher_folder(name)
    if folder is not None:
        place = folder / subfolder if subfolder is not None else folder
        return place if place.exists() else None
    from huggingface_hub import try_to_load_from_cache

    inside = f"{subfolder}/{_INDEX}" if subfolder is not None else _INDEX
    index = try_to_load_from_cache(name, inside, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def pipeline_files(place: Path, variant: str | None = None) -> list[Path]:
    """The files that decide what a pipeline is: its index, the files of its components, code; a single file is itself.

    What else lies there is left out: cards, pictures, components that the index does not name, hidden files, and
    weights beside those that are loaded.

    Args:
        place: a pipeline's folder, or a single file.
        variant: of the weights that are asked for.
    """
    if place.is_file():
        return [place]
    index = place / _INDEX
    if not index.is_file():
        return []
    try:
        entries = dict(read_json(index))
    except (ValueError, TypeError):  # loading it says what is wrong
        entries = {}
    components = [
        place / name
        for name, entry in entries.items()
        if isinstance(entry, list) and entry and isinstance(entry[0], str)
    ]
    inside = [[file for file in folder.rglob("*") if _is_read(file, place)] for folder in components if folder.is_dir()]
    return [index, *place.glob("*.py"), *(file for files in inside for file in _loaded(files, variant))]


def _loaded(files: list[Path], variant: str | None) -> list[Path]:
    """A component's files without weights of another variant, or of another format, than is loaded."""
    weights = {file: match for file in files if (match := _weights(file.name)) is not None}
    variants = {match["variant"] for match in weights.values()}
    chosen = {variant} & variants or {None} & variants or variants
    formats = {match["format"] for match in weights.values() if match["variant"] in chosen}
    best = "safetensors" if "safetensors" in formats else "bin"
    return [
        file
        for file in files
        if file not in weights or (weights[file]["variant"] in chosen and weights[file]["format"] == best)
    ]


def _weights(name: str) -> re.Match[str] | None:
    return WEIGHTS.fullmatch(name) or _LIST.fullmatch(name)


def _is_read(file: Path, place: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(place).parts)
    return file.suffix in _READ and not hidden and file.is_file()
