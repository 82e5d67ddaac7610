"""Each item is held to the rules that were learnt from one of them: where a sample or its time stands may be its own.

A video of more frames, a mask or a place in the clip may move the entries that follow the sample. The rules would then
put noise where such an item has its picture, and its student would be trained on another one than its prompt's. A run
of few steps shows it, in which the network's answer to the recorded item stands in for it; the network itself answers
once where an item is told in another form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.recording.errors import RecordingError
from fewstep.recording.loop.fresh import fresh_samples
from fewstep.recording.loop.starts import skipped_steps
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.fit import differs
from fewstep.recording.rules.item_fit import carries, changing_arguments, moving_entries
from fewstep.recording.rules.rules import SampleRule, TimeRule
from fewstep.recording.second.fit import call_of
from fewstep.recording.watch.finite import refuse_unfinite_conditioning
from fewstep.recording.watch.observation import NetworkCall, Observation, Step, Stub
from fewstep.recording.watch.subject import Subject

# Any count will do for a run of two steps.
_STEPS = 4
# Relative: a sum or a cast between the network and its scheduler rounds.
_CLOSE = 1e-3


class ItemCheck:
    """Runs a pipeline for one item after the other.

    Args:
        stub: stands in for the network, with its answer to the recorded item.
        call: the call that it answered.
        recipe: how the network is called.
    """

    def __init__(self, stub: Stub, call: NetworkCall, recipe: Recipe) -> None:
        self.stub, self._sample = stub, recipe.sample
        self._shape = _shape(call, recipe.sample)
        # Other shapes of what holds the sample, for which the network itself has answered.
        self._known: set[tuple[int, ...]] = set()

    def run(self, make: Callable[[Stub], Observation]) -> tuple[Observation, bool]:
        """A run of an item, and whether the network itself answered in its first step.

        It does where the pipeline fails with what stands in for it, which may not have the form that this item's answer
        has, and once for each shape of what holds the sample.

        Args:
            make: makes the run; called again where the network itself is to answer.

        Raises:
            RecordingError: the pipeline failed.
        """
        try:
            seen = make(self.stub)
        except RecordingError:
            seen = None
        if seen is not None and _first_shape(seen, self._sample) in (self._shape, *self._known):
            return seen, False
        seen = make(Stub(self.stub.components, live=frozenset({0}), beside=self.stub.beside))
        self._known.add(_first_shape(seen, self._sample))
        return seen, True

    def told(self, subject: Subject, recipe: Recipe, item: Item, seed: int = 0, *, plain: bool = True) -> NetworkCall:
        """The network's first call for an item.

        Args:
            subject: the pipeline with guidance off.
            recipe: how its network is called.
            item: what it is called for.
            seed: of what the pipeline draws.
            plain: the pipeline leaves the recorded item's sample as it is between its steps.

        Raises:
            RecordingError: the pipeline failed, or the rules do not hold for this item; it is named.
        """
        fresh, given = fresh_samples(3), list[Tensor]()

        def replaced(index: int, sample: Tensor) -> Tensor:
            given.append(fresh(index, sample))
            return given[-1]

        def make(stub: Stub) -> Observation:
            given.clear()
            return subject.run(_STEPS, [item], seed=seed, steps=2, stub=stub, replace=replaced)

        seen, answered = self.run(make)
        calls = [call for step in seen.steps[:1] for call in step.calls]
        if calls:
            refuse_unfinite_conditioning(subject.pipeline, calls, subject.call(_STEPS, [item], seed=seed))
        self.hold(subject, recipe, item, seen, answered=answered)
        if plain and len(seen.steps) > 1 and differs(given[0].to(seen.steps[1].sample), seen.steps[1].sample):
            raise RecordingError(
                f"{item}: {subject} changes its sample between steps, and not that of the recorded item; such items "
                "need a run of their own"
            )
        return calls[-1]

    def hold(self, subject: Subject, recipe: Recipe, item: Item, seen: Observation, *, answered: bool) -> None:
        """Raise where the rules do not hold in a run of an item with fresh samples.

        Args:
            subject: the pipeline with guidance off.
            recipe: how its network is called.
            item: that was called for.
            seen: the run.
            answered: the network itself answered; else what stood in for it had the form of its answer to the recorded
                item, so that what becomes of an answer shows for items of that form.

        Raises:
            RecordingError: it names the item.
        """
        shown = answered or _first_shape(seen, recipe.sample) == self._shape
        if (why := why_not(str(subject), recipe, seen, answered=shown)) is not None:
            raise RecordingError(f"{item}: {why}; such items need a run of their own")


def why_not(name: str, recipe: Recipe, seen: Observation, *, answered: bool) -> str | None:
    """Why the rules of a recipe do not hold in a run with fresh samples, in words; None: they do.

    Args:
        name: the pipeline's.
        recipe: how its network is called.
        seen: the run.
        answered: what stood in for the network had the form of its answer, so that what becomes of that shows.
    """
    steps = seen.steps[:2]
    if len(steps) < 2 or skipped_steps(seen):
        return f"{name} leaves out steps of its walk for it"
    shape = tuple(steps[0].network_input.shape[1:])
    if shape != recipe.sample_shape:
        return f"its sample is {list(shape)}, and the recorded item's is {list(recipe.sample_shape)}"
    linked: tuple[str, ...] = ()
    if (second := recipe.second) is not None:
        own = [replace(step, calls=[call_of(step, second.component)]) for step in steps]
        switch = () if second.switch is None else (second.switch.argument,)
        if (why := _why_not(second.component, own, second.sample, second.times, switch)) is not None:
            return why
        linked = tuple(link.argument for link in second.links)
    if (why := _why_not(recipe.component, steps, recipe.sample, recipe.times, linked)) is not None:
        return why
    if answered and not all(_answers(recipe, step) for step in steps):
        return f"{name} takes other entries of its network's answer for it than for the recorded item"
    return None


def _why_not(
    component: str, steps: Sequence[Step], sample: SampleRule, times: Sequence[TimeRule], apart: Collection[str]
) -> str | None:
    """Why the rules of one network's arguments do not hold in these steps of fresh samples; None: they do."""
    rules = {rule.argument: rule for rule in times}
    for name in changing_arguments(steps):
        if name not in (sample.argument, *rules, *apart):
            return f"the argument {name} of {component} changes from step to step for it"
    values = [step.calls[-1].arguments.get(sample.argument) for step in steps]
    moved = moving_entries(values)
    if not all(carries(sample, step) for step in steps) or moved is None or bool((moved & ~_own(sample, steps)).any()):
        return (
            f"{sample.argument} of {component} holds the sample in other places for it than for the recorded item, so "
            "that its picture lies elsewhere"
        )
    for name, rule in rules.items():
        moved = moving_entries([step.calls[-1].arguments.get(name) for step in steps])
        if moved is not None and not torch.equal(moved, _timed(rule, len(moved))):
            return f"other entries of {name} of {component} follow the time for it than for the recorded item"
    return None


def _own(rule: SampleRule, steps: Sequence[Step]) -> Tensor:
    """Which entries of an argument (flat) are the sample's by its rule."""
    value = steps[0].calls[-1].arguments[rule.argument]
    rest = rule.rest(value)
    made: Any = rule.value(torch.ones_like(steps[0].network_input), None if rest is None else torch.zeros_like(rest))
    return (torch.stack(made) if isinstance(made, list) else made).flatten().cpu() == 1


def _timed(rule: TimeRule, length: int) -> Tensor:
    """Which of so many entries follow the time by its rule."""
    if not rule.moving:
        return torch.ones(length, dtype=torch.bool)
    timed = torch.zeros(length, dtype=torch.bool)
    for first, run in rule.moving:
        timed[first : first + run] = True
    return timed


def _answers(recipe: Recipe, step: Step) -> bool:
    """Whether the scheduler is given what the recipe makes of the network's answer."""
    at = torch.full((1,), step.timestep, dtype=torch.float64, device=step.network_input.device)
    try:
        made = recipe.output.model_output(step.calls[-1].output, step.network_input, at)
    except (RuntimeError, ValueError, IndexError):
        return False
    given = step.model_output
    return made.shape == given.shape and float((made - given).abs().max()) <= _CLOSE * float(given.abs().max())


def _first_shape(seen: Observation, sample: SampleRule) -> tuple[int, ...]:
    """The shape of what holds the sample in a run's first step."""
    return _shape(seen.steps[0].calls[-1], sample) if seen.steps and seen.steps[0].calls else ()


def _shape(call: NetworkCall, sample: SampleRule) -> tuple[int, ...]:
    value = call.arguments.get(sample.argument)
    if isinstance(value, list):
        return (len(value), *value[0].shape)
    return tuple(value.shape) if isinstance(value, Tensor) else ()
