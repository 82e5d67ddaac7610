"""What a network is told of an item: what its pictures change, what is drawn, and what belongs to one sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning, remark
from fewstep.conditioning.item import Item
from fewstep.recording.call_parts import without_sample
from fewstep.recording.errors import RecordingError
from fewstep.recording.item_marks import candidate_marks, moved_paths
from fewstep.recording.items import with_pictures_of
from fewstep.recording.observation import Step, Stub
from fewstep.recording.pipeline import evaluating
from fewstep.recording.recipe import Recipe
from fewstep.recording.subject import Subject

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
    """

    pictures: frozenset[str]
    items: frozenset[str]
    draws: frozenset[str]
    start: float = 0.0

    def describe(self) -> list[str]:
        """One text for each kind."""
        found = [("of each item", self.items | self.pictures), ("of each draw", self.draws)]
        texts = [f"{', '.join(sorted(paths))}: {words}" for words, paths in found if paths]
        trace = f"the first sample: {self.start:.1g} of it follows the pictures ({_STEPS} steps)"
        return texts + ([trace] if self.start else [])


def learn_items(
    subject: Subject, network: nn.Module, component: str, recipe: Recipe, step: Step
) -> tuple[dict[str, Any], Told]:
    """What the network was told in a step of the recording's item, marked, and what changes it.

    Args:
        subject: the pipeline with guidance off.
        network: the network of
        component: that name.
        recipe: how it is called.
        step: the first one.

    Raises:
        RecordingError: it is told nothing of the pictures, or items cannot be told apart in one call.
    """
    invocation = subject.invocation
    item, other = invocation.item, invocation.other

    def told(item: Item, seed: int = 0) -> dict[str, Any]:
        call = subject.run(_STEPS, [item], before=component, seed=seed).pending[-1]
        return without_sample(call, recipe)

    one, two, swapped = without_sample(step.calls[-1], recipe), told(other), with_pictures_of(item, other)
    pictures = moved_paths(one, told(swapped))
    if not pictures:
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
    )
    fallback = None
    for marked in candidate_marks(subject, component, recipe, one, found.items | found.pictures):
        agreed = _agrees(marked, two, network, recipe, step)
        if agreed:
            return marked, found
        if agreed is None and fallback is None:
            fallback = marked
    if fallback is None:
        raise RecordingError(
            f"two items in one call of the {component} of {subject} do not give what each of them gives alone, however "
            "what it is told is divided among them; it cannot be recorded"
        )
    return fallback, found


def _agrees(
    marked: dict[str, Any], other: dict[str, Any], network: nn.Module, recipe: Recipe, step: Step
) -> bool | None:
    """Whether two items in one call of the network give what each gives alone; None: they cannot form one batch."""
    one = Conditioning(marked, 1)
    try:
        two = remark(other, marked, 1)
        both = Conditioning.cat([one, two])
    except ValueError:
        return None
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
