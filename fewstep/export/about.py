"""What a student says of itself: ``fewstep.json``, read from a folder or the hub, and the call that it fills in."""

from __future__ import annotations

import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.errors import one_line
from fewstep.export.about_form import why_misshapen
from fewstep.export.counts import heed_count
from fewstep.export.errors import ExportError
from fewstep.export.heeded import what_is_not_heeded, what_is_untrained
from fewstep.export.related.record import refuse_strength, relative_of
from fewstep.export.step_noise import step_noise_from
from fewstep.export.student_adapter import has_adapters
from fewstep.reading import inside, read_json
from fewstep.recording.call.plain import as_taken
from fewstep.recording.pipeline import modules_of

FILE = "fewstep.json"


def read_about(student: str | Path, **fetching: Any) -> dict[str, Any]:
    """The content of a student's ``fewstep.json``; ``fetching`` are huggingface_hub's download arguments.

    Raises:
        ExportError: no such folder or hub repository, or not a student.
    """
    path = fetched(student, FILE, **fetching)
    try:
        about: dict[str, Any] = read_json(path)
        reason = why_misshapen(about)
    except (OSError, ValueError) as error:
        reason = one_line(error)
    if reason is not None:
        raise ExportError(f"{FILE} of {student} is damaged ({reason}); export the student again")
    return about


def fetched(student: str | Path, name: str, **fetching: Any) -> Path:
    """Where a file of a student lies, downloaded if need be; arguments and errors as :func:`read_about`."""
    if not isinstance(student, str | Path):
        raise ExportError(f"a student is a folder or a hub id, and this is a {type(student).__name__}")
    folder = Path(student)
    try:
        path = inside(folder, name)
    except ValueError as error:
        raise ExportError(f"{student} names a file outside of its folder ({name!r}), which is not read") from error
    if folder.is_dir():
        if path.is_file():
            return path
        if not (folder / FILE).is_file() and not (folder / "model_index.json").is_file():
            raise ExportError(f"{student} is not a diffusers pipeline: it has no model_index.json")
        raise ExportError(
            f"{student} is not a fewstep student: it has no {name}; DiffusionPipeline.from_pretrained loads it, and "
            "fewstep eval takes it as --teacher"
        )
    if isinstance(student, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", student):
        return _download(student, name, fetching)
    raise ExportError(f"there is no folder {student}")


def _download(repository: str, name: str, fetching: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, **fetching))
    except HFValidationError as error:
        raise ExportError(f"there is no folder {repository}") from error
    except LocalEntryNotFoundError as error:
        raise ExportError(f"there is no folder {repository}, and the hub cannot be reached for it") from error
    except EntryNotFoundError as error:
        raise ExportError(f"{repository} on the hub is not a fewstep student: it has no {name}") from error
    except HfHubHTTPError as error:
        reason = type(error).__name__
        raise ExportError(f"there is no folder {repository}, nor can the hub give it ({reason})") from error


def call_of(stock: type[DiffusionPipeline], about: Mapping[str, Any]) -> dict[str, Any]:
    """The call in a student's ``fewstep.json`` as its pipeline takes it, with tuples where JSON has lists."""
    return as_taken(stock, about["call"])


def student_class(
    stock: type[DiffusionPipeline],
    about: dict[str, Any],
    *,
    warned_of: Callable[[DiffusionPipeline], Sequence[str]] = lambda _: (),
) -> type[DiffusionPipeline]:
    """A subclass of ``stock`` that fills in the call, under its name, so that what it saves names the stock class.

    Args:
        stock: the student's own pipeline class, or a relative of it that was walked at export.
        about: the content of its ``fewstep.json``.
        warned_of: what of the pipeline a caller is warned of, asked at each call.

    Raises:
        ExportError: the student is wrong under this class, or was not tried under it.
    """
    signature, relative = inspect.signature(stock.__call__), relative_of(stock, about)
    filled = call_of(stock, about if relative is None else relative)
    usual = {name: parameter.default for name, parameter in signature.parameters.items()} | filled

    @functools.wraps(stock.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        missing = {name: value for name, value in filled.items() if name not in given}
        for text in warned_of(self):
            warnings.warn(text, stacklevel=2)
        heed_count(self, about, given)
        # An adapter that stands for guidance heeds one (pipelines/speed_up.py).
        apart = {"negative_prompt"} if about.get("code") == "speed_up.py" else set()
        asked = {name: value for name, value in given.items() if name not in apart}
        unheeded = what_is_not_heeded(asked, usual, about.get("guidance_range"))
        if unheeded is not None and not about.get("guidable"):
            warnings.warn(unheeded, stacklevel=2)
        if relative is None:
            if (untrained := what_is_untrained(given, *_pictures(about))) is not None:
                warnings.warn(untrained, stacklevel=2)
        else:
            refuse_strength(stock, relative, {**missing, **given}, about.get("counts", ()))
        with step_noise_from(self, given.get("generator") if about.get("renoise") in ("fresh", "tcd") else None):
            return stock.__call__(self, *args, **kwargs, **missing)

    def save_pretrained(self: DiffusionPipeline, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        refuse_adapters(self)
        stock.save_pretrained(self, save_directory, *args, **kwargs)
        write_about(Path(save_directory), about)

    body = {
        "__call__": call,
        "__doc__": stock.__doc__,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "fewstep": about,
    }
    if "lora" not in about:  # which would be no whole pipeline
        body["save_pretrained"] = functools.wraps(stock.save_pretrained)(save_pretrained)
    return type(stock.__name__, (stock,), body)


def _pictures(about: Mapping[str, Any]) -> tuple[Sequence[str], Mapping[str, str]]:
    return about.get("untrained_pictures", ()), about.get("inputs", {})


def refuse_adapters(pipeline: DiffusionPipeline) -> None:
    """Raise :class:`ExportError` for a pipeline with adapters: diffusers writes such under names that nothing loads."""
    held = next((name for name, module in modules_of(pipeline).items() if has_adapters(module)), None)
    if held is not None:
        raise ExportError(
            f"the {held} holds adapters, and a pipeline with such is saved under names that nothing loads: fuse them "
            "(a student by fewstep.apply(..., fuse=True), others by fuse_lora), and call unload_lora_weights() first"
        )


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``fewstep.json`` into a student's folder."""
    (folder / FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
