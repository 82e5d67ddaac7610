"""Loading a student so that a bare call samples it right.

A stock pipeline cannot hold defaults for its call: ``pipe(prompt)`` runs 50 guided steps. So the loaded object is an
instance of a subclass of the stock class whose ``__call__`` fills in what ``fewstep.json`` says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fewstep.errors import UserError, one_line
from fewstep.export.about import read_about, student_class
from fewstep.export.any_flow import refuse_other_gate
from fewstep.export.apply import apply
from fewstep.export.errors import ExportError
from fewstep.export.own_code import is_own_code
from fewstep.export.related.record import relative_class
from fewstep.reading import read_yaml
from fewstep.teachers.names import teacher_folder
from fewstep.teachers.single_file import load_single_file
from fewstep.teachers.source import Source, find_source
from fewstep.teachers.weights import load_pipeline

# The words of from_pretrained that also decide where and how a single file is fetched.
_FETCHING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def load(
    student: str | Path,
    base: str | Path | None = None,
    *,
    pipeline: str | type[DiffusionPipeline] | None = None,
    **from_pretrained: Any,
) -> DiffusionPipeline:
    """Load a student's pipeline; its call needs a prompt, labels or its inputs (``fewstep.json``), and nothing else.

    Args:
        student: a folder that fewstep wrote, a whole pipeline or a LoRA, or a hub id (``"owner/name"``).
        base: of a LoRA: where its base model lies; default where :func:`base_of` finds it.
        pipeline: another pipeline class of the family, or its name, or what it is for: ``"image-to-image"``,
            ``"inpainting"``, ``"image-to-video"``, ``"video-to-video"``, ``"controlnet"``,
            ``"controlnet-image-to-image"``, ``"controlnet-inpainting"``. Its call also needs its pictures, and refuses
            a strength at which the student is wrong. A control network is given as ``controlnet``.
        from_pretrained: passed on to ``DiffusionPipeline.from_pretrained``.

    Returns:
        An instance of a subclass of the stock pipeline class. Arguments that are given win over ``fewstep.json``.

    Raises:
        ExportError: no such folder or hub repository, not a pipeline, not a student, files that do not hold the weights
            of its networks, a LoRA without its base, one with code that is not this package's own and that
            ``trust_remote_code=True`` did not allow, or a pipeline under which the student is wrong.
    """
    fetching = {key: value for key, value in from_pretrained.items() if key in _FETCHING}
    about = read_about(student, **fetching)
    is_lora = "lora" in about
    if base is not None and not is_lora:
        raise ExportError(f"{student} is a whole pipeline and has no base model; leave the base out")
    kind = DiffusionPipeline if pipeline is None else relative_class(about, pipeline, from_pretrained)
    source = find_base(student, about, base) if is_lora else Source(str(student))
    if source.is_file and pipeline is not None:
        raise ExportError(
            f"the base {source.place} is a single file, which loads as its own pipeline alone; save it as a folder "
            "(save_pretrained) and give that as the base"
        )
    # Where and in which state the student itself is fetched says nothing of its base.
    words = {key: value for key, value in from_pretrained.items() if not (is_lora and key == "revision")}
    own = {"trust_remote_code": True} if not is_lora and is_own_code(student) else {}
    try:
        words = {**about.get("load", {}), **own, **source.words, **words}
        if source.is_file:
            loaded = load_single_file(Path(source.place), **{"dtype": torch.float32, **words})
        else:
            loaded = load_pipeline(source.place, kind, **words)
    except (OSError, ValueError) as error:
        raise ExportError(f"{source.place} does not load: {one_line(error)}") from error
    if is_lora:
        return apply(loaded, student, **fetching)
    refuse_other_gate(loaded, about)
    loaded.__class__ = student_class(type(loaded), about)
    return loaded


def find_base(student: str | Path, about: dict[str, Any], base: str | Path | None = None) -> Source:
    """The files of a LoRA student's base model; arguments and errors as :func:`base_of`.

    Where it is the model that ``fewstep.json`` means, it is the revision, folder inside and variant that this names.
    """
    name = base_of(student, about, base)
    told: dict[str, Any] = told_of_base(student, about, base)
    try:
        return find_source(name, flag="the base", **told)
    except UserError as error:
        raise ExportError(str(error)) from error


def told_of_base(student: str | Path, about: dict[str, Any], base: str | Path | None) -> dict[str, str]:
    """Revision, folder inside and variant of a LoRA student's base model; none for another one of the caller's."""
    known = (None, _teacher_of_run(Path(student)), about["base_model"])
    told = about.get("base_files", {}) if base is None or str(base) in known else {}
    return {name: value for name, value in told.items() if name != "file"}


def base_of(student: str | Path, about: dict[str, Any], base: str | Path | None = None) -> str:
    """Where the base model of a LoRA student lies: a pipeline's folder, a single file, or a hub id.

    Looked for, in this order: what the caller says; the teacher of the run in whose folder the LoRA lies; the name in
    ``fewstep.json``, which is a hub id, an embedded teacher, or the name of a folder (``./fashion-sd`` for one that is
    called like an embedded teacher).

    Args:
        student: its folder, or its hub id.
        about: the content of its ``fewstep.json``.
        base: what the caller says: a folder, a hub id, or an embedded teacher.

    Raises:
        ExportError: there is none of them.
    """
    from fewstep.fashion import TEACHERS, teacher_path

    for name in (str(base),) if base is not None else (_teacher_of_run(Path(student)), about["base_model"]):
        if name in TEACHERS:
            return str(teacher_path(name))
        inside = told_of_base(student, about, base).get("subfolder", "")
        if name and (Path(name).is_file() or (Path(name) / inside / "model_index.json").is_file()):
            return name
        if name and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
            return name
    if base is not None:
        raise ExportError(f"the base {base} is no folder of a diffusers pipeline, and no hub id")
    raise ExportError(
        f"{student} is a LoRA of {about['base_model']}, which does not lie here under that name: say where (--base DIR)"
    )


def teacher_of(student: str | Path, about: dict[str, Any]) -> str | None:
    """What a student was distilled from: the teacher of its run where that lies here, else the name on its card.

    Args:
        student: its folder, or its hub id.
        about: the content of its ``fewstep.json``.
    """
    given = _teacher_of_run(Path(student))
    folder = None if given is None else teacher_folder(given)
    return given if folder is not None and folder.exists() else about.get("base_model")


def _teacher_of_run(folder: Path) -> str | None:
    """What a run was given as its teacher; None where ``folder`` is no part of one."""
    try:
        teacher = read_yaml(folder.parent / "config.yaml")["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return teacher if isinstance(teacher, str) else None
