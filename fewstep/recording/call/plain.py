"""A pipeline's keyword arguments as JSON gives them back: so a student's users get them, and so they are recorded."""

from __future__ import annotations

import contextlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from fewstep.recording.errors import RecordingError


def plain_call(pipeline_class: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments written as JSON and read again, as :func:`as_taken` gives them; numpy's numbers become plain ones.

    Raises:
        RecordingError: one that JSON cannot hold, or gives back as something else.
    """
    return as_taken(pipeline_class, {name: _read_back(name, value) for name, value in call.items()})


def as_taken(pipeline_class: type, call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that were read from JSON, with tuples where the pipeline's signature asks for them.

    JSON knows lists only, and SDXL, for one, adds its size tuples to each other.

    Args:
        pipeline_class: whose ``__call__`` says, by annotation or by default value, what it takes.
        call: the arguments; names that it does not take are left as they are.
    """
    hints = argument_hints(pipeline_class)
    return {name: _shaped(value, hints.get(name)) for name, value in call.items()}


def argument_hints(pipeline_class: type) -> dict[str, Any]:
    """The types that a pipeline's call states for its arguments; of one without a statement that of its default."""
    function: Any = pipeline_class.__call__
    names = inspect.unwrap(function).__globals__
    hints: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hints[name] = type(parameter.default)
        if parameter.annotation is not inspect.Parameter.empty:
            stated = types.SimpleNamespace(__annotations__={name: parameter.annotation})
            # An annotation may name what exists for type checkers only, or what this Python does not know.
            with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
                hints |= get_type_hints(stated, names)
    return hints


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _shaped(value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shaped(child, None) for key, child in value.items()}
    if not isinstance(value, list):
        return value
    kinds = [member for member in members(hint) if (get_origin(member) or member) in (list, tuple)]
    kind = next((member for member in kinds if (get_origin(member) or member) is list), kinds[0] if kinds else list)
    inner = [argument for argument in get_args(kind) if argument is not Ellipsis]
    each = inner if len(inner) == len(value) else inner[:1] * len(value) if inner else [None] * len(value)
    children = [_shaped(child, own) for child, own in zip(value, each, strict=True)]
    return tuple(children) if (get_origin(kind) or kind) is tuple else children


def _read_back(name: str, value: Any) -> Any:
    if (key := _odd_key(value)) is not None:
        raise RecordingError(
            f"the argument {name} of the call has the key {key!r}, and JSON has texts as keys only, so a student's "
            "fewstep.json cannot hold it; leave it out"
        )
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_number))
    except TypeError as error:
        raise RecordingError(
            f"the argument {name} of the call is {_described(value)}, which JSON (a student's fewstep.json) cannot "
            "hold; leave it out or give a plain value"
        ) from error
    except ValueError as error:  # NaN, an infinity, or a list within itself
        raise RecordingError(f"the argument {name} of the call is not finite; give a finite value") from error


def _number(value: Any) -> Any:
    """numpy's and torch's numbers."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise TypeError


def _described(value: Any) -> str:
    """What a value is, in words; of a list what it holds."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(sorted({type(child).__name__ for child in value}))}"
    return f"a {type(value).__name__}"


def _odd_key(value: Any) -> Any:
    """The first key of a dict inside a value that is no text; None: there is none."""
    if isinstance(value, dict):
        own = next((key for key in value if not isinstance(key, str)), None)
        return own if own is not None else next((k for v in value.values() if (k := _odd_key(v)) is not None), None)
    if isinstance(value, list | tuple):
        return next((k for v in value if (k := _odd_key(v)) is not None), None)
    return None
