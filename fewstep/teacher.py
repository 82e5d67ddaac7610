"""Finding and loading a teacher's pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError

from fewstep.errors import UserError


def load_teacher(name: str, trust_remote_code: bool = False) -> DiffusionPipeline:
    """The float32 pipeline of a folder, a hub id, or an embedded teacher (``fashion-sd``, ``fashion-flow``).

    Raises:
        UserError: there is no such thing, it is not a pipeline, or it needs code that the user did not allow.
    """
    path = teacher_folder(name)
    if path is not None and not (path / "model_index.json").is_file():
        what = "does not exist" if not path.exists() else "is not a diffusers pipeline: it has no model_index.json"
        raise UserError(f"--teacher {name} {what}")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path or name, torch_dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, AttributeError, json.JSONDecodeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--teacher {name} cannot be loaded as a diffusers pipeline: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def teacher_folder(name: str) -> Path | None:
    """Where a teacher lies on this machine; None for what can only be a hub id (``owner/name``)."""
    from fewstep.fashion import TEACHERS, teacher_path

    if name in TEACHERS:
        return teacher_path(name)
    path = Path(name)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return None if looks_like_hub_id and not path.exists() else path


def base_model(name: str) -> str:
    """What a model card calls the teacher: its hub id, an embedded teacher's name, or its folder's name."""
    from fewstep.fashion import TEACHERS

    return name if name in TEACHERS or teacher_folder(name) is None else Path(name).resolve().name


def teacher_license(name: str) -> str | None:
    """The licence in the front matter of the teacher's model card, None where there is no card or it names none."""
    folder = teacher_folder(name)
    try:
        card = ModelCard.load(folder / "README.md" if folder is not None else name)
    except (OSError, ValueError, EntryNotFoundError):
        return None
    return card.data.license
