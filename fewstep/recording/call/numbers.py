"""Numbers of a call that no pipeline can mean: many take them, and sample something else than was asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fewstep.recording.call.plain import argument_hints, members
from fewstep.recording.errors import RecordingError

#: How the arguments that hold a guidance scale end.
SCALES = ("guidance_scale", "cfg_scale")
# Of what there is at least one.
_SIZES = frozenset({"height", "width", "size", "frames", "length", "fps", "rate", "steps"})
# How the arguments end that are parts of a whole.
_SHARES = ("eta", "rescale", "strength")


def refuse_impossible(pipeline_class: type, call: Mapping[str, Any]) -> None:
    """Raise for a number out of its range: a size below one, a negative count or scale, a share beyond 0..1.

    What the pipeline itself has as its default is in range, whatever it is.

    Args:
        pipeline_class: whose signature says which arguments are whole numbers.
        call: keyword arguments, as JSON gives them back.

    Raises:
        RecordingError: it names the argument, what it was given and what it takes.
    """
    hints = argument_hints(pipeline_class)
    parameters = inspect.signature(pipeline_class.__call__).parameters
    for name, value in call.items():
        if name not in parameters or value == parameters[name].default:
            continue
        least = 1 if set(name.split("_")) & _SIZES else 0
        numbers = value if isinstance(value, list | tuple) else [value]
        if _whole(hints.get(name)) and any(isinstance(n, bool | float | str) for n in numbers):
            _refuse(pipeline_class, name, value, f"a whole number from {least} up")
        numbers = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        if any(n < least for n in numbers):
            _refuse(pipeline_class, name, value, f"a number from {least} up")
        if name.endswith(_SHARES) and any(n > 1 for n in numbers):
            _refuse(pipeline_class, name, value, "a number from 0 to 1")


def _refuse(pipeline_class: type, name: str, value: Any, wanted: str) -> None:
    raise RecordingError(f"{name} of {pipeline_class.__name__} is {wanted}, not {value!r}; mend the call")


def _whole(hint: Any) -> bool:
    """Whether a type is that of whole numbers, or of several of them, and nothing else."""
    parts = [part for member in members(hint) for part in (member, *getattr(member, "__args__", ()))]
    return int in parts and not {float, str, bool} & {part for part in parts if isinstance(part, type)}
