"""Which files a pipeline is made of, in a folder or in the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.teachers.names import teacher_folder

_INDEX = "model_index.json"
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


def pipeline_files(place: Path) -> list[Path]:
    """The files that decide what a pipeline is: its index, the files of its components, code; a single file is itself.

    What else lies there is left out: cards, pictures, components that the index does not name, hidden files.
    """
    if place.is_file():
        return [place]
    index = place / _INDEX
    if not index.is_file():
        return []
    try:
        entries = dict(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # loading it says what is wrong
        entries = {}
    components = [place / name for name, entry in entries.items() if isinstance(entry, list) and any(entry)]
    inside = [file for folder in components if folder.is_dir() for file in folder.rglob("*")]
    return [index, *place.glob("*.py"), *(file for file in inside if _is_read(file, place))]


def _is_read(file: Path, place: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(place).parts)
    return file.suffix in _READ and not hidden and file.is_file()
