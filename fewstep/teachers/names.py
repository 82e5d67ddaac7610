"""What a teacher is called, and where a name lies on this machine."""

from __future__ import annotations

import re
from pathlib import Path

#: Names of folders and files that say nothing of the model in them: numbers, hashes, what every tool calls its output.
_MEANINGLESS = re.compile(
    r"(checkpoints?|snapshots?|models?|weights|diffusers|pipelines?|outputs?|out|results?|runs?|exports?|final|last|latest"
    r"|best|main|merged|original|ema|fp16|fp32|bf16|unet|transformer|loras?|adapters?|cache|hub|huggingface|tmp|temp|data"
    r"|home|root|content|workspace|mnt|media|opt|srv|usr|var|app|users?|downloads?|desktop|documents"
    r"|(pytorch_|diffusion_pytorch_|adapter_)?model|pytorch_lora_weights"
    r"|(checkpoint|ckpt|epoch|step|iter|global_step|run|v|version)[-_]?\d+|\d+|[0-9a-f]{12,})",
    re.IGNORECASE,
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
#: What a card calls a teacher whose folders are all of such names.
UNNAMED = "an unnamed teacher"


def teacher_folder(name: str) -> Path | None:
    """Where a teacher lies on this machine; None for what can only be a hub id (``owner/name``)."""
    from fewstep.fashion import TEACHERS, teacher_path

    if name in TEACHERS:
        return teacher_path(name)
    path = Path(name)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return None if looks_like_hub_id and not path.exists() else path


def resolved(path: Path) -> Path:
    """Where a path leads once its links are followed; itself where they lead in a ring."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # the one of newer versions of Python, the other of older ones
        return path.absolute()


def embedded_name(name: str) -> str | None:
    """The embedded teacher that a name or the path of its folder means; None for any other teacher."""
    from fewstep.fashion import TEACHERS, teacher_path

    folder = teacher_folder(name)
    if folder is None:
        return None
    return next((known for known in TEACHERS if resolved(folder) == resolved(teacher_path(known))), None)


def base_model(name: str) -> str:
    """What a model card calls the teacher: its hub id, an embedded teacher's name, or what :func:`called` says.

    A user's folder that is called like an embedded teacher is ``./fashion-sd``: the bare name means the embedded one.
    """
    from fewstep.fashion import TEACHERS

    if (known := embedded_name(name)) is not None:
        return known
    if teacher_folder(name) is None:
        return name
    found = called(Path(name))
    return f"./{found}" if found in TEACHERS else found


def called(path: Path) -> str:
    """The name of what lies in a folder or a file, which tells no more of this machine.

    In the hub's cache it is the hub id that it was fetched from. Where the own name says nothing (``checkpoint-1000``,
    ``diffusers``) it is the nearest above it that says something; a user's name is none.
    """
    real = resolved(path)
    # In the cache links lead from a telling path to one that is not; a user's links may lead into the cache.
    for place in (path.absolute(), real):
        for folder in (place, *place.parents):
            if (cached := _CACHED.fullmatch(folder.name)) is not None:
                return f"{cached[1]}/{cached[2]}"
    for place in (real, *real.parents):
        if place == Path.home() or place.parent.name in ("home", "Users"):
            break
        own = place.stem if place.suffix == ".safetensors" else place.name
        if own and _MEANINGLESS.fullmatch(own) is None:
            return own
    return UNNAMED


def same_teacher(one: str, other: str) -> bool:
    """Whether two names mean one teacher: by its folder where both lie here, else by what a model card calls them."""
    folders = [resolved(folder) for name in (one, other) if (folder := teacher_folder(name)) and folder.exists()]
    return folders[0] == folders[1] if len(folders) == 2 else base_model(one) == base_model(other)
