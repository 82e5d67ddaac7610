"""Loading a teacher's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fewstep.errors import UserError, first_line
from fewstep.teachers.quantization import pipeline_quantization, without_hooks
from fewstep.teachers.single_file import load_single_file
from fewstep.teachers.source import Source, find_source, refuse_no_table
from fewstep.teachers.weights import WeightsError, load_pipeline


def load_teacher(
    name: str,
    trust_remote_code: bool = False,
    flag: str = "--teacher",
    *,
    source: Source | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    **parts: Any,
) -> DiffusionPipeline:
    """The pipeline of a folder, a single file, a hub id, or an embedded teacher (``fashion-sd``, ``fashion-flow``).

    Args:
        name: of these.
        trust_remote_code: let it run code from its own folder.
        flag: which setting named it, for messages.
        source: which of its files; default as :func:`fewstep.teachers.source.find_source` finds them by the name alone.
        dtype: of its weights.
        quantization: of its denoisers, one of :data:`fewstep.teachers.quantization.QUANTIZATIONS`.
        parts: of the pipeline that are there already; the others are loaded.

    Raises:
        UserError: there is no such thing, it is not a pipeline, its files do not hold the weights of its networks, it
            needs code that the user did not allow, or a library of its quantisation is missing.
    """
    source = source or find_source(name, flag=flag)
    try:
        if source.is_file:
            if quantization is not None:
                raise UserError(f"{flag} {name} is a single file, which --quantization does not read; leave one out")
            pipeline = load_single_file(Path(source.place), dtype=dtype, flag=flag, **parts)
        else:
            _refuse_lacking(source, parts, f"{flag} {name}")
            how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **source.words}
            if quantization is not None:
                how["quantization_config"] = pipeline_quantization(quantization, source, dtype)
            pipeline = load_pipeline(source.place, **how, **parts)
    except WeightsError as error:
        raise UserError(f"{flag} {name} cannot be used: {error}") from error
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


def _refuse_lacking(source: Source, given: dict[str, Any], teacher: str) -> None:
    """Raise for a part without a folder, or with a configuration that is none.

    The libraries look for the files of the one in the pipeline's own folder, and do not name the other.
    """
    if isinstance(source.place, Path):
        loaded = sorted(source.parts() - given.keys())
        for file in (file for part in loaded for file in (source.place / part).glob("*config.json")):
            refuse_no_table(file, f"{teacher} cannot be loaded: its {file.relative_to(source.place)}")
        lacking = sorted(part for part in source.parts() - given.keys() if not (source.place / part).is_dir())
        if lacking:
            raise UserError(
                f"{teacher} lacks {', '.join(lacking)}: its model_index.json names "
                f"{'them' if len(lacking) > 1 else 'it'}, and there is no such folder; fetch its files anew"
            )
