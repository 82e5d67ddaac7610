"""What a recorded pipeline tells its network of a prompt, a label or an item; the network itself does not run."""

from __future__ import annotations

from typing import Any, Protocol

from fewstep.conditioning.conditioning import Conditioning, remark
from fewstep.conditioning.item import Item
from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance.formula import GuidedCall
from fewstep.recording.items.between_steps import BetweenSteps
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.learning import Told
from fewstep.recording.items.marks import by_axes
from fewstep.recording.loop.call_parts import in_types_of, mark_arguments, split_pieces, without_sample
from fewstep.recording.recipe import Recipe
from fewstep.recording.watch.observation import NetworkCall
from fewstep.recording.watch.subject import Subject, Watching

# Any count will do for a run that ends before the network's first call.
CONDITION_STEPS = 4


class Teller(Protocol):
    """What is asked of a recording here; its attributes have its docstrings."""

    @property
    def subject(self) -> Subject: ...
    @property
    def component(self) -> str: ...
    @property
    def recipe(self) -> Recipe: ...
    @property
    def marked(self) -> dict[str, Any]: ...
    @property
    def told(self) -> Told | None: ...
    @property
    def check(self) -> ItemCheck | None: ...
    @property
    def guided(self) -> GuidedCall | None: ...
    @property
    def between(self) -> BetweenSteps | None: ...


def tell(teller: Teller, one: Any, seed: int = 0) -> Conditioning:
    """The conditioning of a prompt, a label or an item, as `seed` draws it."""
    check = teller.check
    if check is None:
        return _as_marked(teller, one, _told(teller, [one], seed))
    if teller.between is None:
        call = check.told(teller.subject, teller.recipe, one, seed)
        return _as_marked(teller, one, _beside_sample(teller, one, call))
    watched = teller.between.watch(one, seed)
    check.hold(teller.subject, teller.recipe, one, watched.seen, answered=watched.answered)
    told = _as_marked(teller, one, _beside_sample(teller, one, watched.seen.steps[0].calls[-1]))
    return teller.between.added(told, one, watched)


def tell_guided(teller: Teller, item: Item, seed: int) -> tuple[Conditioning, ...]:
    """What the network is told for each answer of a guided step of an item, the positive one first; () unguided."""
    if (guided := teller.guided) is None:
        return ()
    # Up to the last call of the step, so that nothing is asked of the network but what it is told.
    watching = Watching(before=teller.component, skip=guided.calls - 1, stub=guided.stub)
    seen = teller.subject.run(CONDITION_STEPS, [item], guided.changes, seed, **watching)
    calls = [call for call in seen.pending if call.component == teller.component]
    try:
        pieces = split_pieces(calls, teller.recipe, teller.marked)
    except (RecordingError, ValueError):
        if any(len(call.arguments[teller.recipe.sample.argument]) > 1 for call in calls):
            raise  # several answers in one call are told apart by the recorded item's marks alone
        # This item has other arguments than the recorded one: mark each answer by itself.
        paths = frozenset() if teller.told is None else teller.told.pictures | teller.told.items
        pieces = [Conditioning(by_axes(without_sample(call, teller.recipe), paths), 1) for call in calls]
    positive = Conditioning(teller.marked, 1)
    return tuple(in_types_of(pieces[number], positive) for number in guided.order)


def name_of(one: Any) -> str:
    """A prompt, a label or an item, for messages."""
    return str(one) if isinstance(one, Item) else repr(one)


def _as_marked(teller: Teller, one: Any, arguments: dict[str, Any]) -> Conditioning:
    try:
        return remark(arguments, teller.marked, 1)
    except ValueError:
        # It has other arguments than the recorded one (a mask where that had None): mark it by itself.
        if teller.told is not None:
            return Conditioning(by_axes(arguments, teller.told.pictures | teller.told.items), 1)
        return Conditioning(mark_arguments(teller.component, arguments, _told(teller, [one, one])), 1)


def _told(teller: Teller, several: list[Any], seed: int = 0) -> dict[str, Any]:
    """What the pipeline tells its network of these prompts or labels in one call."""
    seen = teller.subject.run(CONDITION_STEPS, several, before=teller.component, seed=seed)
    return _beside_sample(teller, several[0], seen.pending[-1])


def _beside_sample(teller: Teller, one: Any, call: NetworkCall) -> dict[str, Any]:
    try:
        return without_sample(call, teller.recipe)
    except ValueError as error:
        raise RecordingError(
            f"{name_of(one)} is told to the {teller.component} in another shape than the recorded one: {error}; "
            "items of another size need a recording of their own"
        ) from error
