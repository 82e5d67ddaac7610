"""Pictures, masks and videos in a pipeline's call: they are one sample's own, and come with items.

What an argument takes is read from its type, and only where that says nothing from its name. What was given is looked
at, too: a picture may come under any name.
"""

from __future__ import annotations

import dataclasses
import inspect
import traceback
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

import numpy as np
import PIL.Image
from diffusers import SchedulerMixin
from torch import Tensor

from fewstep.conditioning.item import holds_picture
from fewstep.recording.call.plain import argument_hints
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import modules_of

_BY_ITEMS = (
    'a picture, a mask or a video is one sample\'s own and comes with items (--items, or items=[{"prompt": ..., '
    '"image": ...}, ...] with two different ones at least); if its network also works from the prompt alone, record '
    "the pipeline for that"
)
_WORDS = frozenset({"image", "images", "video", "videos", "mask"})
# Masks of texts, and counts and limits of pictures.
_OTHER_WORDS = frozenset({"prompt", "attention", "text", "num", "max"})


def refuse_pictures(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Raise for a call with a picture in it, and for a pipeline that cannot be called without one, without items.

    Args:
        pipeline: a diffusers pipeline.
        call: keyword arguments of its call, prompts and labels apart.

    Raises:
        RecordingError: it says which argument, and that it comes with items.
    """
    name = type(pipeline).__name__
    takes = picture_arguments(type(pipeline))
    given = [key for key, value in call.items() if _holds_picture(value) or (key in takes and not _is_number(value))]
    if given:
        raise RecordingError(f"{name} was given {', '.join(given)}: {_BY_ITEMS}")
    parameters = inspect.signature(type(pipeline).__call__).parameters
    required = [key for key in takes if parameters[key].default is inspect.Parameter.empty]
    if required:
        raise RecordingError(f"{name} requires {', '.join(required)}: {_BY_ITEMS}")
    adapted = [part for part, module in modules_of(pipeline).items() if getattr(module, "encoder_hid_proj", None)]
    if adapted and any(key.startswith("ip_adapter") for key in takes):
        raise RecordingError(
            f"the {adapted[0]} of {name} has an IP-Adapter, which needs a picture in every call: {_BY_ITEMS} "
            "(unload_ip_adapter)"
        )


def picture_arguments(pipeline_class: type) -> list[str]:
    """The arguments of a pipeline's call that take pictures, masks or videos, or what is made of them."""
    hints = argument_hints(pipeline_class)
    return [name for name, hint in hints.items() if _takes_picture(name, hint)]


def own_pictures(pipeline_class: type) -> list[str]:
    """The :func:`picture_arguments` but for an adapter's, which all pipelines of some families take and none needs."""
    return [name for name in picture_arguments(pipeline_class) if "ip_adapter" not in name]


def is_encoded(name: str) -> bool:
    """Whether an argument takes what a picture is encoded to, which users do not have."""
    return not {"latents", "embeds"}.isdisjoint(name.split("_"))


def advice(pipeline: Any, arguments: Mapping[str, Any], error: Exception) -> str:
    """What to do about a call that failed: a package, or a picture that it may need, may be all that it lacks."""
    if isinstance(error, NameError | ImportError) and error.name:
        return f"install {error.name}, which this pipeline uses"
    if (scheduler := _scheduler_that_raised(error)) is not None:
        return f"its {scheduler} raised that, so its configuration may not fit this pipeline"
    if any(holds_picture(value) for value in arguments.values()):
        lacking = [key for key in own_pictures(type(pipeline)) if key not in arguments and not is_encoded(key)]
        return "check the arguments of the call and of the items" + (f" (no {' or '.join(lacking)})" if lacking else "")
    check = "check the arguments of the call"
    wanting = [key for key in own_pictures(type(pipeline)) if key not in arguments]
    return check if not wanting else f"if it is for want of {', '.join(wanting)}: {_BY_ITEMS}; else {check}"


def _scheduler_that_raised(error: Exception) -> str | None:
    """The class of the scheduler in whose method an error was raised; None where it was raised elsewhere."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_locals.get("self") if frames else None
    return type(raised_in).__name__ if isinstance(raised_in, SchedulerMixin) else None


def _takes_picture(name: str, hint: Any) -> bool:
    if name.startswith("prompt"):
        return False
    if _mentions(hint, PIL.Image.Image):
        return True
    words = set(name.split("_"))
    named = bool(words & _WORDS) and not words & _OTHER_WORDS
    return named and (
        hint in (Any, inspect.Parameter.empty, type(None)) or _mentions(hint, Tensor, np.ndarray, str, list)
    )


def _mentions(hint: Any, *kinds: type) -> bool:
    """Whether a type is one of these, or holds one as a part, as a member of a union or as a field."""
    if isinstance(hint, type) and issubclass(hint, kinds):
        return True
    parts = get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        parts = tuple(get_type_hints(hint).values())
    return any(_mentions(part, *kinds) for part in parts)


def _holds_picture(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_picture(child) for child in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_holds_picture(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, PIL.Image.Image)


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
