"""Items whose samples are of other sizes: how the same network is called at each, learnt and proven like the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

from fewstep.conditioning.conditioning import remark
from fewstep.conditioning.item import Form, Item
from fewstep.recording.errors import RecordingError
from fewstep.recording.items.between_steps import see_between
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.marks import by_axes
from fewstep.recording.loop.call_parts import without_sample
from fewstep.recording.loop.experts import components_of
from fewstep.recording.loop.long_run import SHORT
from fewstep.recording.recipe import Recipe
from fewstep.recording.recorder import fit_recipe, unguided_runs
from fewstep.recording.recording import Recording
from fewstep.recording.second.fit import stand_in
from fewstep.recording.watch.encoded_once import encoded_once
from fewstep.recording.watch.observation import Observation

#: Sizes that one teacher is recorded at.
MOST = 64


def with_sizes(recording: Recording, items: Sequence[Item], *, proven: bool = True) -> Recording:
    """The recording with what holds at the other sizes of these items' samples, each proven; itself for one size.

    Args:
        recording: of items, the first of which is its own.
        items: all that samples will be made for.
        proven: or not, of networks without weights.

    Raises:
        RecordingError: the network is called otherwise at another size, or the grid of times depends on the size, or
            there are more than :data:`MOST`.
    """
    invocation = recording.invocation
    by_key: dict[Form, list[Item]] = {}
    for item in items:
        by_key.setdefault(invocation.size_key(item), []).append(item)
    own_key = invocation.size_key(invocation.item)
    if by_key.keys() <= {own_key}:
        return recording
    with encoded_once(recording.pipeline):
        return _with_sizes(recording, by_key, own_key, proven)


def _with_sizes(recording: Recording, by_key: Mapping[Form, list[Item]], own_key: Form, proven: bool) -> Recording:
    own = recording.invocation.item
    first = _first_step(recording, own)
    keys: dict[tuple[int, ...], list[Form]] = {recording.sample_shape: [own_key]}
    for key, members in by_key.items():
        if key == own_key:
            continue
        seen = _first_step(recording, members[0])
        shape = tuple(seen.steps[0].network_input.shape[1:])
        if shape != recording.sample_shape:
            _refuse_other_grid(recording, members[0], first, seen)
        keys.setdefault(shape, []).append(key)
        if len(keys) > MOST:
            raise RecordingError(
                f"the items have samples of more than {MOST} sizes, and each is recorded by itself: bring their "
                f"pictures to a few sizes{_by_columns(recording)}"
            )
    del keys[recording.sample_shape][0]
    sizes = []
    for shape, some in keys.items():
        if shape != recording.sample_shape:
            one = _at(recording, frozenset(some), *_two(by_key[some[0]]))
            if proven:
                one.prove()
            sizes.append(one)
    return replace(
        recording,
        recipe=replace(recording.recipe, sizes=tuple(one.recipe for one in sizes)),
        sizes=tuple(sizes),
        keys=frozenset([own_key, *keys[recording.sample_shape]]),
    )


def _first_step(recording: Recording, item: Item) -> Observation:
    return recording.subject.run(SHORT, [item], steps=1)


def _at(recording: Recording, keys: frozenset[Form], item: Item, other: Item) -> Recording:
    """The recording as if it had been made with these two items, which have a size of these keys.

    Raises:
        RecordingError: the network is called otherwise than in that of the first size.
    """
    invocation = replace(recording.invocation, item=item, other=other)
    subject = replace(recording.subject, invocation=invocation)
    runs, experts = unguided_runs(subject, recording.component, recording.schedule)
    recipe = fit_recipe(subject, experts, recording.schedule, runs, None)
    if _arithmetic(recipe) != _arithmetic(recording.recipe):
        raise RecordingError(f"{item} has samples of another size, at which {subject} calls its network otherwise")
    one, told = without_sample(runs[0][0].calls[-1], recipe), recording.told
    try:
        marked: dict[str, Any] = remark(one, recording.marked, 1).tree
    except ValueError:
        marked = by_axes(one, frozenset() if told is None else told.pictures | told.items)
    check = ItemCheck(stand_in(components_of(experts), runs), runs[0][0].calls[-1], recipe)
    between = None if recording.between is None else see_between(subject, recipe, recording.schedule, check)
    changes: dict[str, Any] = {"recipe": recipe, "marked": marked, "between": between, "check": check, "proof": None}
    return replace(recording, invocation=invocation, keys=keys, _encoded={}, **changes)


def _arithmetic(recipe: Recipe) -> Any:
    """What of a recipe no size changes."""
    times = [replace(rule, rows=1, shape=(), moving=()) for rule in recipe.times]
    second = None if recipe.second is None else recipe.second.component
    return recipe.sample.argument, times, recipe.output.relation, second, recipe.unread is None


def _refuse_other_grid(recording: Recording, item: Item, first: Observation, seen: Observation) -> None:
    """Raise where a teacher of another size walks other times, so that no student has one grid for both."""
    if first.timesteps is None or seen.timesteps is None or torch.equal(first.timesteps, seen.timesteps):
        return
    raise RecordingError(
        f"{item} has samples of another size than {recording.invocation.item}, and {recording.subject} sets its grid "
        f"of times by the size, so that one student cannot serve both: give all the same size{_by_columns(recording)}"
    )


def _by_columns(recording: Recording) -> str:
    """By which arguments a size is set, in words."""
    sides = [side for side in ("height", "width") if side in recording.invocation.parameters]
    if len(sides) == 2:
        return " (height and width, as columns or in --call)"
    return f" (that of {', '.join(recording.invocation.item.pictures)})"


def _two(items: Sequence[Item]) -> tuple[Item, Item]:
    """An item and one of its form with other pictures, which are its own mirrored where there is none."""
    first = items[0]
    alike = (item for item in items[1:] if item.form == first.form and Item(item.pictures) != Item(first.pictures))
    return first, next(alike, None) or with_mirrored(first)


def with_mirrored(item: Item) -> Item:
    """An item with its pictures mirrored and darkened, or turned into negatives where these are the same.

    Masks stay masks. Mirrored alone, a picture is the same to a network that is told means over its places.
    """
    pictures = item.pictures
    mirrored = {name: _changed(value, negative=False) for name, value in pictures.items()}
    if Item(mirrored) == Item(pictures):
        mirrored = {name: _changed(value, negative=True) for name, value in pictures.items()}
    return Item({**item.arguments, **mirrored}, f"{item}, mirrored")


def _changed(value: Any, *, negative: bool) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_changed(child, negative=negative) for child in value)
    if isinstance(value, PIL.Image.Image):
        return PIL.ImageOps.invert(value) if negative else PIL.ImageOps.mirror(value).point(lambda v: v * v // 255)
    if negative:
        return 1 - value
    if isinstance(value, Tensor):
        return value.flip(-1) * value.flip(-1).abs()
    flipped = np.flip(value, 1).copy()
    return flipped * abs(flipped) if flipped.dtype.kind == "f" else flipped
