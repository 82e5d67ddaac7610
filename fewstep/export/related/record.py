"""What ``fewstep.json`` says of a student's relatives, where it is read: which class to load, and at which strength."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from fewstep.export.errors import ExportError
from fewstep.export.related.call import STRENGTH
from fewstep.export.related.classes import CONTROL, missing_package, takes_control
from fewstep.export.related.ranges import Outcome, Range, at, nearest

#: What a student's own pipeline is for, where it takes prompts.
_OWN_TASKS = ("text-to-image", "text-to-video")


def relative_class(
    about: Mapping[str, Any], wanted: str | type[DiffusionPipeline], parts: Mapping[str, Any]
) -> type[DiffusionPipeline]:
    """The pipeline class that a user means.

    Args:
        about: the content of a student's ``fewstep.json``.
        wanted: a class, its name, or what it is for.
        parts: what else ``fewstep.load`` was given: the control network, for one.

    Raises:
        ExportError: the student is wrong under it, was not tried under it, or a control network is missing.
    """
    name = wanted if isinstance(wanted, str) else wanted.__name__
    if name in _OWN_TASKS and about.get("conditional") == "prompt":
        name = about.get("pipeline", name)
    related = about.get("related", {})
    for_it = [kind for kind, record in related.items() if name == record["task"]]
    right = [kind for kind in for_it if "why_not" not in related[kind]]
    name = (right or for_it or [name])[0]
    found = getattr(diffusers, name, None) if isinstance(wanted, str) else wanted
    if name not in (*related, about.get("pipeline")) or found is None:
        raise ExportError(f"this student was not tried under {name}; {_known(about)}")
    relative_of(found, about)
    if takes_control(found) and parts.get(CONTROL) is None:
        raise ExportError(f"{name} needs a control network of the student's family: give controlnet=...")
    if (package := missing_package(found)) is not None:
        raise ExportError(f"{name} needs the package {package}: pip install {package}")
    return found


def relative_of(stock: type, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``fewstep.json`` says of a class; None of the student's own.

    Raises:
        ExportError: the student is wrong under it, or was not tried under it.
    """
    name = stock.__name__
    if name == about.get("pipeline", name):
        return None
    record: dict[str, Any] | None = about.get("related", {}).get(name)
    if record is None:
        raise ExportError(f"this student was not tried under {name}; {_known(about)}")
    if "why_not" in record:
        raise ExportError(f"this student is not for {name}: {record['why_not']}")
    return record


def refuse_strength(
    stock: type, relative: Mapping[str, Any], call: Mapping[str, Any], own_counts: Sequence[int]
) -> None:
    """Raise for a strength, or a number of steps, at which the student ignores the picture or leaves its grid.

    A number of steps at which it is right by itself, and was not tried with pictures, is warned of.

    Args:
        stock: the relative's class.
        relative: what ``fewstep.json`` says of it.
        call: its arguments, the filled-in ones among them.
        own_counts: at which the student is right by itself.

    Raises:
        ExportError: one line that names the nearest strength that works.
    """
    count, strength = call.get("num_inference_steps"), call.get(STRENGTH)
    rows = rows_at(relative, count)
    if not rows and count in own_counts:
        tried = ", ".join(relative["counts"])
        warnings.warn(f"this student was tried under {stock.__name__} at {tried} steps, not at {count}", stacklevel=3)
    row = at(rows, 1.0 if strength is None else strength)
    if row is None or row.outcome.why_not is None:
        return
    where = f"{stock.__name__} at {count} steps" + ("" if strength is None else f" and strength {strength:g}")
    other = None if strength is None else nearest(rows, strength)
    if other is not None and (there := at(rows, other)) is not None:
        advice = f"the nearest strength that works is {other:g} ({_in_words(there.outcome)})"
    else:
        others = [n for n in relative["counts"] if any(r.outcome.why_not is None for r in rows_at(relative, n))]
        advice = f"no strength works; take {' or '.join(others)} steps"
    raise ExportError(f"{where}: {row.outcome.why_not}; {advice}")


def rows_at(relative: Mapping[str, Any], count: Any) -> list[Range]:
    """The ranges of strength at a number of steps, none where that was not walked."""
    return [Range.from_json(row) for row in relative["counts"].get(str(count), [])]


def _in_words(outcome: Outcome) -> str:
    plural = "" if outcome.calls == 1 else "s"
    return f"{outcome.calls} call{plural} from timestep {outcome.timestep:g}"


def _known(about: Mapping[str, Any]) -> str:
    """What there is to choose from."""
    if "related" not in about:
        return "an older fewstep exported it, which tried no other pipeline: --resume of its run exports it again"
    right = {kind: record["task"] for kind, record in about.get("related", {}).items() if "why_not" not in record}
    if not right:
        return "no other pipeline of its family takes a picture and is right with it"
    return "there are " + ", ".join(f"{kind} ({task})" for kind, task in right.items())
