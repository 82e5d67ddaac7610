"""The items of a program: named, of a cache, or made up; and the recording of a pipeline with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.conditioning.item import holds_picture
from fewstep.data.cache_form import read_index
from fewstep.data.items import Items, read_items
from fewstep.data.made_up import made_up_items
from fewstep.errors import UserError
from fewstep.fashion import looking
from fewstep.fashion.items import inpainting_items
from fewstep.recording import Recording
from fewstep.recording.call.pictures import is_encoded, own_pictures, picture_arguments
from fewstep.recording.errors import RecordingError
from fewstep.teachers.names import embedded_name

#: Of an embedded teacher that looks at pictures: so many holes and clothes that a short run sees each a few times.
OWN_ITEMS = 2000


def given_items(
    source: str | Path | Sequence[Any] | None,
    cache: str | Path | None,
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    *,
    name: str | None = None,
    progress: bool = False,
) -> Items | None:
    """The items that a teacher is asked for; None for one of prompts, labels or nothing.

    An embedded teacher that looks at pictures has items of its own, of training pictures.

    Args:
        source: as :func:`fewstep.data.items.read_items` takes them.
        cache: a folder of ``fewstep cache``, which knows where its items were.
        pipeline: the teacher's.
        call: of the pipeline.
        name: of the teacher.
        progress: show how far the look at them is.

    Raises:
        UserError: a row cannot be meant, the call holds a picture, or the cache's items are nowhere.
    """
    takes = picture_arguments(type(pipeline))
    pictured = [name for name, value in call.items() if holds_picture(value) or (name in takes and _may_be_one(value))]
    if pictured:
        raise UserError(
            f"the call has {', '.join(pictured)}, and a picture is of one sample: give it by --items, a row with a "
            "prompt and its pictures for each"
        )
    if source is None and cache is not None:
        index = read_index(Path(cache))
        if index is None or index["kind"] != "item":
            return None
        source = index.get("source")
        if source is None or not Path(source).exists():
            raise UserError(
                f"the items that the cache {cache} was made of are not in {source}, and two of them show how a teacher "
                "is called: say by --items where they are"
            )
    if source is None and name is not None and looking(embedded_name(name)):
        source = inpainting_items(OWN_ITEMS, pictures="training")
    if source is None:
        return None
    return read_items(source, type(pipeline), call, cached=cache is not None, progress=progress)


def record_for(
    record: Callable[..., Recording],
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    items: Items | None,
    *,
    make_up: bool = False,
    without_images: bool = False,
) -> Recording:
    """The recording of a pipeline, with two items where there are some.

    Args:
        record: makes it (:func:`fewstep.recording.record`).
        pipeline: the teacher's.
        call: of the pipeline.
        items: None: of prompts, labels or nothing.
        make_up: two items for a pipeline that looks at pictures, where there are none.
        without_images: a pipeline that also works without a picture is recorded so.

    Raises:
        RecordingError: it cannot be recorded.
        UserError: it looks at pictures and would be recorded without, and nobody said so.
    """
    if items is not None:
        if without_images:
            raise UserError("--without_images is of --prompts, and items hold pictures: leave out one of them")
        return record(pipeline, items=items.two(), **call)
    first: RecordingError | None = None
    for two in made_up_items(pipeline, call) if make_up and not without_images else ():
        try:
            return record(pipeline, items=two, **call)
        except RecordingError as error:
            # The pipeline's own word for want of one more picture; what the recorder says stays.
            if error.__cause__ is None:
                raise
            first = first or error
    if first is not None:
        raise first
    recording = record(pipeline, **call)
    looked_at = [name for name in own_pictures(type(pipeline)) if not is_encoded(name)]
    if looked_at and not make_up and not without_images:
        name, told = type(pipeline).__name__, ", ".join(looked_at)
        raise UserError(
            f"{name} is told pictures ({told}): give --items, or --prompts --without_images, for a student "
            "that sees none"
        )
    return recording


def _may_be_one(value: Any) -> bool:
    return value is not None and not isinstance(value, bool | int | float)
