"""Whether a value is one of its setting: of its type, finite, and no larger than anybody means."""

from __future__ import annotations

import math
import operator
import types
from dataclasses import fields
from pathlib import PurePath
from typing import Any, Union, get_args, get_origin, get_type_hints

from fewstep.errors import UserError

#: The most that a count may be where nothing smaller is said; 64 bits of a seed.
_MOST, _MOST_SEED = 2**31 - 1, 2**63 - 1
#: Of settings that memory is taken by before anything is made: the most that is not a slip of the keyboard.
MOST: dict[str, int] = {
    "batch_size": 2**20,
    "f_bins": 10**6,
    "first_levels": 10**6,
    "intervals": 10**6,
    "last_levels": 10**6,
    "lora_rank": 2**16,
    "pair_steps": 10**4,
    "seed": _MOST_SEED,
    "steps": 10**4,
    "teacher_steps": 10**4,
}
_LIST = "a list in square brackets"
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", dict: "a JSON table"}


def refuse_misfits(settings: Any, required: frozenset[str] = frozenset()) -> None:
    """Check every value of a dataclass by the type that it states; paths become texts, and numpy's numbers plain ones.

    Args:
        settings: the dataclass; a field of another type than those of a command line is passed over.
        required: the texts that must not be empty where they are given.

    Raises:
        UserError: one does not fit; one line names its flag.
    """
    hints = get_type_hints(type(settings))
    for one in fields(settings):
        value = _plain(getattr(settings, one.name))
        kinds = get_args(hints[one.name]) if _is_union(hints[one.name]) else (hints[one.name],)
        if not all((get_origin(kind) or kind) in (*_WORDS, list, types.NoneType) for kind in kinds):
            continue
        setattr(settings, one.name, value)
        if value is None and types.NoneType not in kinds:
            raise UserError(f"--{one.name} must have a value, and it is null")
        if value is not None:
            kind = next(kind for kind in kinds if kind is not types.NoneType)
            _refuse(one.name, value, kind, one.name in required)


def number_within(name: str, value: int, most: int) -> int:
    """``value``, a whole number of at least 1.

    Raises:
        UserError: it is none, is smaller, or more than ``most``; ``name`` is the flag's, with its dashes.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UserError(f"{name} must be between 1 and {most:,}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it: short, as in JSON where it is nothing."""
    text = "null" if value is None else repr(value) if not _is_long(value) else f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def bytes_in_words(number: float) -> str:
    """Bytes for people: GB of 10^9, or MB or kB where that is clearer."""
    if number >= 1e8:
        return f"{number / 1e9:,.2f} GB"
    return f"{number / 1e6:,.1f} MB" if number >= 1e5 else f"{number / 1e3:,.1f} kB"


def takes(kinds: list[type]) -> str:
    """What a setting of these types takes, in words."""
    return " or ".join(_WORDS.get(kind, _LIST) for kind in kinds)


def _refuse(name: str, value: Any, kind: Any, required: bool) -> None:
    if get_origin(kind) is list:
        if not isinstance(value, list | tuple):
            raise UserError(f"--{name} takes {_LIST}, not {shown(value)}")
        for child in value:
            _refuse(name, child, get_args(kind)[0], required)
        return
    if _is_union(kind):
        kind = next((one for one in get_args(kind) if type(value) is one), get_args(kind)[0])
    plain: Any = get_origin(kind) or kind
    of_type = isinstance(value, (int, float) if plain is float else plain)
    if not of_type or (isinstance(value, bool) and plain is not bool):
        raise UserError(f"--{name} takes {takes([plain])}, not {shown(value)}")
    if plain is dict and not all(isinstance(key, str) for key in value):
        raise UserError(f"--{name} takes a JSON table, whose names are texts, not {shown(value)}")
    if plain is float and not (_is_long(value) or math.isfinite(value)):
        raise UserError(f"--{name} must be a finite number, not {value}")
    if plain in (int, float) and isinstance(value, int) and abs(value) > MOST.get(name, _MOST):
        raise UserError(f"--{name} is {shown(value)}, and at most {MOST.get(name, _MOST):,} can be meant")
    if plain is str:
        _refuse_text(name, value, required)


def _refuse_text(name: str, value: str, required: bool) -> None:
    if required and not value:
        raise UserError(f"--{name} is empty; give it a value, or leave it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--{name} is not UTF-8 text: {shown(value)}") from error
    if "\0" in value:
        raise UserError(f"--{name} holds a null character: {shown(value)}")


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if type(value) in (bool, int, float, str) or isinstance(value, bool) or getattr(value, "ndim", None) != 0:
        return value
    return operator.index(value) if hasattr(value, "__index__") and "int" in str(value.dtype) else value.item()


def _is_long(value: Any) -> bool:
    """Whether a number has more digits than Python writes, or a float holds."""
    return isinstance(value, int) and value.bit_length() > 1000


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)
