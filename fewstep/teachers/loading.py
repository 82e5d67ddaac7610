"""Finding and loading a teacher's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fewstep.errors import UserError, first_line
from fewstep.teachers.quantization import pipeline_quantization, without_hooks


def load_teacher(
    name: str,
    trust_remote_code: bool = False,
    flag: str = "--teacher",
    *,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    **parts: Any,
) -> DiffusionPipeline:
    """The pipeline of a folder, a hub id, or an embedded teacher (``fashion-sd``, ``fashion-flow``).

    Args:
        name: of these.
        trust_remote_code: let it run code from its own folder.
        flag: which setting named it, for messages.
        dtype: of its weights.
        quantization: of its denoisers, one of :data:`fewstep.teachers.quantization.QUANTIZATIONS`.
        parts: of the pipeline that are there already; the others are loaded.

    Raises:
        UserError: there is no such thing, it is not a pipeline, it needs code that the user did not allow, or
            a library of its quantisation is missing.
    """
    path = teacher_folder(name)
    if path is not None and not (path / "model_index.json").is_file():
        what = "does not exist" if not path.exists() else "is not a diffusers pipeline: it has no model_index.json"
        raise UserError(f"{flag} {name} {what}")
    try:
        how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if quantization is not None:
            how["quantization_config"] = pipeline_quantization(quantization, str(path or name), dtype)
        pipeline = DiffusionPipeline.from_pretrained(path or name, **how, **parts)
    except UserError:
        raise
    except Exception as error:  # each library that reads a part of the folder has exceptions of its own
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{flag} {name} holds code of its own, which was not run: read it, then --trust_remote_code runs it"
            ) from error
        raise UserError(f"{flag} {name} cannot be loaded as a diffusers pipeline: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return without_hooks(pipeline) if quantization is not None else pipeline


def teacher_folder(name: str) -> Path | None:
    """Where a teacher lies on this machine; None for what can only be a hub id (``owner/name``)."""
    from fewstep.fashion import TEACHERS, teacher_path

    if name in TEACHERS:
        return teacher_path(name)
    path = Path(name)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return None if looks_like_hub_id and not path.exists() else path


def embedded_name(name: str) -> str | None:
    """The embedded teacher that a name or the path of its folder means; None for any other teacher."""
    from fewstep.fashion import TEACHERS, teacher_path

    folder = teacher_folder(name)
    if folder is None:
        return None
    return next((known for known in TEACHERS if folder.resolve() == teacher_path(known).resolve()), None)


def base_model(name: str) -> str:
    """What a model card calls the teacher: its hub id, an embedded teacher's name, or its folder's name.

    A user's folder that is called like an embedded teacher is ``./fashion-sd``: the bare name means the embedded one.
    """
    from fewstep.fashion import TEACHERS

    if (known := embedded_name(name)) is not None:
        return known
    if teacher_folder(name) is None:
        return name
    folder = Path(name).resolve().name
    return f"./{folder}" if folder in TEACHERS else folder


def same_teacher(one: str, other: str) -> bool:
    """Whether two names mean one teacher: by its folder where both lie here, else by what a model card calls them."""
    folders = [folder.resolve() for name in (one, other) if (folder := teacher_folder(name)) and folder.exists()]
    return folders[0] == folders[1] if len(folders) == 2 else base_model(one) == base_model(other)
