"""A few samples of a student (or a teacher) as one picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.config.values import MOST, shown
from fewstep.data.durable import nothing_left, write_durably
from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions, items_of
from fewstep.eval.generate import generate
from fewstep.eval.grid import contact_sheet, tile, to_pil
from fewstep.eval.models import CARD_NAME, Model, student_model, teacher_model
from fewstep.training.pictures import on_white

_MOST = 4096  # samples in one picture
_OF_ITEMS = 16  # where nobody says how many


def sample(
    directory: str | Path,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    nasa_scale: float | None = None,
    label: int | None = None,
    items: str | Path | Sequence[Mapping[str, Any]] | None = None,
    steps: int | None = None,
    seed: int = 0,
    num: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    out: str | Path,
    device: str | None = None,
) -> Path:
    """Write `num` samples as the PNG file `out`, and return its path.

    directory: a student's folder, or a teacher's folder or embedded name (then `steps` must be given, unless embedded).
    revision, subfolder, variant: which of a teacher's files are meant; a student's say that themselves.
    base: where the base model of a LoRA student lies, if it is not found by itself.
    negative_prompt, nasa_scale: what a student steers away from in its attention, and how strongly (`fewstep.nasa`).
    prompt, label or items: what the pipeline is conditioned on, as it needs; items are a prompt with pictures each, as
    of a run, taken in turn. num: default 1, or as many as there are items, at most 16. steps: default the student's own
    count.
    One image is saved as it is, several side by side; a video as a row of up to eight frames.

    Raises UserError with one line for whatever a caller can get wrong.
    """
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"samples are written as PNG: {path} must end in .png")
    if num is not None and not 1 <= num <= _MOST:
        raise UserError(f"num must be between 1 and {_MOST:,}, for one picture, not {shown(num)}")
    told = {"revision": revision, "subfolder": subfolder, "variant": variant}
    model = _model(directory, base, {name: value for name, value in told.items() if value is not None})
    if base is not None and model.base is None:
        raise UserError(f"{directory} is a whole pipeline and has no base model; leave the base out")
    if nasa_scale is not None and negative_prompt is None:
        raise UserError("nasa_scale is how strongly a negative prompt is steered away from: give negative_prompt")
    if negative_prompt is not None and model.role == "teacher":
        raise UserError(f"{directory} is a teacher, and negative_prompt here is what a student steers away from")
    count = next((n for n in (steps, model.steps, _embedded_steps(model)) if n is not None), None)
    if count is None:
        raise UserError(f"{directory} does not say how many steps it takes: give steps")
    if not 1 <= count <= MOST["steps"]:
        raise UserError(f"steps must be between 1 and {MOST['steps']:,}, not {shown(count)}")
    reason = model.why_not(count)
    if reason:
        raise UserError(reason)
    # Inside: it imports diffusers.
    from fewstep.export.steering import nasa

    conditions = _conditions(model, prompt, label, items)
    with nothing_left(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        if num is None:
            num = 1 if items is None else min(len(conditions.values), _OF_ITEMS)
        pipeline = model.load(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), torch.float32)
        call = {**model.call, "num_inference_steps": count}
        if negative_prompt is not None:
            pipeline = nasa(pipeline, negative_prompt, *(() if nasa_scale is None else (nasa_scale,)))
        batches = generate(
            pipeline, call, conditions, range(num), seed=seed, batch_size=min(num, 16), description="samples"
        )
        # On white, where items have samples of several sizes.
        images = on_white([batch.images for batch in batches])
        if images.ndim == 5:
            picture = tile(list(contact_sheet(images)))
        elif num == 1:
            picture = to_pil(images[0])
        else:
            picture = tile(images.split(math.ceil(math.sqrt(num))))
        write_durably(path, lambda unfinished: picture.save(unfinished, format="PNG"))
    return path


def _model(directory: str | Path, base: str | None, files: Mapping[str, str]) -> Model:
    folder = Path(directory)
    if any((place / CARD_NAME).is_file() for place in (folder, folder / "student", folder / "student_lora")):
        if files:
            raise UserError(f"{directory} is a student, which has one set of files; leave out {', '.join(files)}")
        return student_model(folder, base=base)
    return teacher_model(directory, files=files)


def _embedded_steps(model: Model) -> int | None:
    from fewstep.fashion import TEACHERS

    return None if model.embedded is None else TEACHERS[model.embedded].steps


def _conditions(model: Model, prompt: str | None, label: int | None, items: Any) -> SampleConditions:
    kind = model.condition_kind()
    if items is not None or kind == "item":
        if prompt is not None or label is not None:
            raise UserError("items hold the prompts: give them alone")
        return items_of(model, items)
    if kind is None:
        if prompt is not None or label is not None:
            raise UserError(f"{model.source} is unconditional: it takes neither a prompt nor a class")
        return SampleConditions()
    value = prompt if kind == "prompt" else label
    if value is None:
        raise UserError(f"{model.source} needs a {'prompt' if kind == 'prompt' else 'class'}")
    return SampleConditions(kind, (value,))
