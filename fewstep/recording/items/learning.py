"""What a network is told of an item: what its pictures change, what is drawn, and what belongs to one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning, remark
from fewstep.conditioning.item import Item, form
from fewstep.conditioning.tree import Leaf, SampleList, leaves, map_leaves, map_plain
from fewstep.recording.call.items import with_pictures_of
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.marks import candidate_marks, moved_paths
from fewstep.recording.loop.call_parts import without_sample
from fewstep.recording.pipeline import evaluating
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.fit import differs
from fewstep.recording.watch.observation import Step, Stub
from fewstep.recording.watch.subject import Subject

# Any count will do for a run that ends before the network's first call.
_STEPS = 4
# Two items in one call differ from two calls by rounding, and by as much as their answers where they are mixed up.
_ALIKE = 1e-4


@dataclass(frozen=True)
class Told:
    """Paths in what the network is told, by what changes them.

    Attributes:
        pictures: other pictures, all else being equal.
        items: another item.
        draws: another seed: the pipeline samples an encoder's distribution, or adds noise.
        start: how far other pictures move the first sample, relative; 0 where the walk starts from noise alone.
        untold: the items' picture arguments of which the network is told nothing.
    """

    pictures: frozenset[str]
    items: frozenset[str]
    draws: frozenset[str]
    start: float = 0.0
    untold: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """One text for each kind."""
        found = [("of each item", self.items | self.pictures), ("of each draw", self.draws)]
        texts = [f"{', '.join(sorted(paths))}: {words}" for words, paths in found if paths]
        trace = f"the first sample: {self.start:.1g} of it follows the pictures ({_STEPS} steps)"
        silent = f"{', '.join(self.untold)}: nothing; what follows it is outside of the network, or nothing at all"
        return texts + ([trace] if self.start else []) + ([silent] if self.untold else [])


def learn_items(
    subject: Subject, network: nn.Module, component: str, recipe: Recipe, step: Step, check: ItemCheck
) -> tuple[dict[str, Any], Told]:
    """What the network was told in a step of the recording's item, marked, and what changes it.

    Args:
        subject: the pipeline with guidance off.
        network: the network of
        component: that name.
        recipe: how it is called.
        step: the first one.
        check: holds the other items to the recipe.

    Raises:
        RecordingError: it is told nothing of the pictures, or items cannot be told apart in one call.
    """
    invocation = subject.invocation
    item, other = invocation.item, invocation.other

    def told(item: Item, seed: int = 0) -> dict[str, Any]:
        return without_sample(check.told(subject, recipe, item, seed, plain=False), recipe)

    one, two, swapped = without_sample(step.calls[-1], recipe), told(other), with_pictures_of(item, other)
    other_pictures = told(swapped)
    pictures = moved_paths(one, other_pictures)
    if not pictures:
        if moved_paths(one, other_pictures, exact=True):
            raise RecordingError(
                f"the pictures of {item} and {other} are so much alike that the {component} of {subject} is told the "
                "same of both to rounding; give two items whose pictures differ more"
            )
        made = "video" if len(recipe.sample_shape) > 3 else "image"
        raise RecordingError(
            f"the {component} of {subject} is told nothing of {', '.join(item.pictures)}: {subject} only starts from "
            f"its picture, or pins it between steps; distil the text-to-{made} pipeline of the same network: its "
            f"student's weights serve {subject}"
        )
    stub = Stub((component,), step.calls[-1].output)
    first, before = subject.run(_STEPS, [swapped], steps=1, stub=stub).steps[0].network_input, step.network_input
    if recipe.unread is not None:  # which no network looks at
        first, before = (x.masked_fill(recipe.unread.to(x.device), 0) for x in (first, before))
    found = Told(
        frozenset(pictures),
        frozenset(moved_paths(one, two)),
        frozenset(moved_paths(one, told(item, seed=1))),
        float((first - before).double().norm() / before.double().norm()),
        _untold(item, other, one, told),
    )
    unjoined: list[dict[str, Any]] = []
    for marked in candidate_marks(subject, component, recipe, one, found.items | found.pictures):
        both = _beside(marked, two)
        if both is None:
            unjoined.append(marked)
        elif _agrees(*both, network, recipe, step):
            return marked, found
    for marked in unjoined:
        # They are of other sizes. So are not two of one size that differ in every number.
        both = Conditioning(marked, 1), Conditioning(map_leaves(marked, _changed), 1)
        if not _shares_its_own(marked, two) and _agrees(*both, network, recipe, step):
            return marked, found
    raise RecordingError(
        f"two items in one call of the {component} of {subject} do not give what each of them gives alone, however "
        f"what it is told is divided among them; it cannot be recorded: {ANOTHER}"
    )


def _untold(item: Item, other: Item, one: dict[str, Any], told: Callable[[Item], dict[str, Any]]) -> tuple[str, ...]:
    """The picture arguments that change nothing of what the network is told of an item."""
    if len(item.pictures) == 1:
        return ()
    swapped = {name: Item({**item.arguments, name: other.arguments[name]}, str(item)) for name in item.pictures}
    return tuple(name for name, shown in swapped.items() if not moved_paths(one, told(shown), exact=True))


def _beside(marked: dict[str, Any], other: dict[str, Any]) -> tuple[Conditioning, Conditioning] | None:
    """The recorded item and another one, marked alike; None: they cannot form one batch."""
    try:
        both = Conditioning(marked, 1), remark(other, marked, 1)
    except ValueError:
        return None
    return both if Conditioning.compatible(*both) else None


def _shares_its_own(marked: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether what stands here for all samples is of the same form, and another, for another item: then it is none."""
    try:
        there = dict(leaves(remark(other, marked, 1).tree))
    except ValueError:
        return False
    for path, node in leaves(marked):
        theirs = there[path]
        if isinstance(node, Leaf) and isinstance(theirs, Leaf) and not node.rows:
            alike = form(node.value) == form(theirs.value)
            if alike and differs(node.value, theirs.value):
                return True
    return False


def _agrees(one: Conditioning, two: Conditioning, network: nn.Module, recipe: Recipe, step: Step) -> bool:
    """Whether two items in one call of the network give what each gives alone."""
    both = Conditioning.cat([one, two])
    noise = torch.randn(2, *recipe.sample_shape, generator=torch.Generator().manual_seed(0))
    x = (noise * step.network_input.float().std().cpu()).to(step.network_input)

    # Where a second network has a say.
    switch = None if recipe.second is None else recipe.second.switch
    timestep = step.timestep if switch is None else min(step.timestep, switch.highest)

    def call(x: Tensor, conditioning: Conditioning) -> Tensor:
        at = torch.full((len(x),), timestep, dtype=torch.float64)
        return recipe.call(network, x, at, conditioning, next_timestep=at / 2).double()

    with torch.no_grad(), evaluating(network):
        alone = torch.cat([call(x[:1], one), call(x[1:], two)])
        try:
            together = call(x, both)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # the network does not take its arguments so
    allowed = _ALIKE if x.dtype.itemsize >= 4 else 300 * _ALIKE
    return bool((together - alone).abs().max() <= allowed * alone.abs().max())


def _changed(node: Leaf | SampleList) -> Leaf | SampleList:
    """What belongs to a sample, as another sample of the same form may have it."""
    if isinstance(node, SampleList):
        return SampleList(tuple(map_plain(entry, _scaled) for entry in node.items), node.rows, node.is_tuple)
    return Leaf(map_plain(node.value, _scaled), node.rows) if node.rows else node


def _scaled(value: Tensor) -> Tensor:
    return 0.8 * value if value.is_floating_point() else value
