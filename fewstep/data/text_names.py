"""By which names a data set calls what its images show."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

#: Columns, fields and suffixes that hold texts and labels.
TEXTS = ("text", "caption", "txt")
LABELS = ("label", "cls")


def only_one(names: Collection[str], there: Collection[str]) -> str | None:
    """The one of these names that is there; None where none is.

    Raises:
        ValueError: several are.
    """
    found = [name for name in names if name in there]
    if len(found) > 1:
        raise ValueError(f"has {' and '.join(found)}: say by --data_text which of them is meant")
    return found[0] if found else None


def as_label(value: Any) -> int:
    """A whole number, as a table has it or as a text.

    Raises:
        ValueError: it is none: half a class, or true, is a mistake.
    """
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"its label {value!r} is no whole number")
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its label {str(value)[:40]!r} is no whole number") from error
