"""Which part of what a network is told belongs to a sample, where a pipeline may not take two of them in one call.

How a pipeline takes several pictures is not known beforehand: a list is one for each prompt here and several of one
prompt there. So a call of two is tried in both ways, and where neither is understood the leading axes decide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from fewstep.conditioning.conditioning import mark
from fewstep.conditioning.tree import Leaf, SampleList
from fewstep.recording.errors import RecordingError
from fewstep.recording.loop.call_parts import equal, without_sample
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.fit import differs
from fewstep.recording.watch.subject import Subject

# Any count will do for a run that ends before the network's first call.
_STEPS = 4


def candidate_marks(
    subject: Subject, component: str, recipe: Recipe, one: dict[str, Any], moved: Collection[str]
) -> Iterator[dict[str, Any]]:
    """`one`, what the network is told of the recording's item, marked in each way that can be; the likeliest first.

    Args:
        subject: the pipeline with guidance off.
        component: the network.
        recipe: how it is called.
        one: its arguments without the sample and the time.
        moved: the paths in them that another item changes.
    """
    item = subject.invocation.item
    # Two prompts with one picture, then with two.
    calls: tuple[dict[str, Any], ...] = (item.pictures, {})
    for changes in calls:
        try:
            call = subject.run(_STEPS, [item, item], changes, before=component).pending[-1]
            if len(call.arguments[recipe.sample.argument]) == 2:
                yield mark(one, without_sample(call, recipe))
        except (RecordingError, ValueError):
            continue
    for moved_too in (True, False):
        yield by_axes(one, moved, alone=moved_too)


def by_axes(told: dict[str, Any], moved: Collection[str], *, alone: bool = True) -> dict[str, Any]:
    """The tree of one sample, marked by its leading axes.

    Args:
        told: a network's arguments at one sample, those of the sample and the time apart.
        moved: the paths that another item changes.
        alone: a leading axis of one is a sample's even where nothing moved it; else it is shared.
    """
    return {name: _by_axes(value, name, moved, alone) for name, value in told.items()}


def moved_paths(one: Any, other: Any, path: str = "", *, exact: bool = False) -> set[str]:
    """The paths of the leaves that differ between two structures; where these differ, the path down to there.

    Args:
        one: arguments of a network.
        other: others.
        path: that of both.
        exact: any difference counts; else only what is more than rounding.
    """
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(_under(path, name), one[name], other[name]) for name in one]
    elif isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return set() if not differs(one, other) or (equal(one, other) and not exact) else {path}
    return {found for under, a, b in pairs for found in moved_paths(a, b, under, exact=exact)}


def _by_axes(value: Any, path: str, moved: Collection[str], alone: bool) -> Any:
    if isinstance(value, dict):
        return {name: _by_axes(child, _under(path, name), moved, alone) for name, child in value.items()}
    if isinstance(value, list) and len(value) == 1 and not _led_by_one(value[0]):
        return SampleList(tuple(value), 1)
    if isinstance(value, list | tuple):
        return type(value)(_by_axes(child, f"{path}[{i}]", moved, alone) for i, child in enumerate(value))
    if not isinstance(value, Tensor) or value.dim() == 0:
        return Leaf(value)
    if path in moved:
        return Leaf(value, len(value))
    return Leaf(value, int(alone and len(value) == 1))


def _led_by_one(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
