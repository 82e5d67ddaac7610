"""When a pipeline's second network has a say: seen in a walk of as many steps as are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.recording.second.fit import call_of
from fewstep.recording.second.network import SecondNetwork
from fewstep.recording.watch.observation import Step, Stub
from fewstep.recording.watch.subject import Subject


def switched(second: SecondNetwork, steps: list[Step]) -> list[tuple[float, bool]]:
    """The timestep of each step, and whether the second network was on there."""
    assert second.switch is not None  # else there is nothing to see
    name, value = second.switch.argument, second.switch.value
    return [(step.timestep, call_of(step, second.component).arguments[name] == value) for step in steps]


def walk_of(
    subject: Subject, second: SecondNetwork, components: tuple[str, ...], count: int, changes: dict[str, Any]
) -> list[tuple[float, bool]]:
    """:func:`switched` of a walk of the pipeline.

    Args:
        subject: the pipeline, with the scheduler that walks.
        second: its second network.
        components: its denoisers, which run in the first step only.
        count: how many steps it makes.
        changes: to the call.
    """
    stub = Stub(components, live=frozenset({0}))
    return switched(second, subject.run(count, changes=changes, steps=count, stub=stub).steps)


def at_steps(second: SecondNetwork, steps: list[Step]) -> SecondNetwork:
    """The second network as it is switched in a walk that was seen whole."""
    if second.switch is None:
        return second
    return replace(second, switch=second.switch.at(switched(second, steps)))
