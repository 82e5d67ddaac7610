"""Finding a second network in the step: a component whose answers the denoiser is told in every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fewstep.recording.errors import RecordingError
from fewstep.recording.rules.dtypes import dtype_name, network_dtype
from fewstep.recording.rules.fit import differs
from fewstep.recording.rules.item_fit import changing_arguments, fit_entries
from fewstep.recording.second.network import Link, SecondNetwork, Switch, parts_of
from fewstep.recording.watch.observation import NetworkCall, Step, Stub


def components_beside(*runs: Sequence[Step]) -> tuple[str, ...]:
    """The components that a loop calls in every step before its denoiser. The first step also holds the encoders'."""
    loops = [step.calls for run in runs for step in run[1:] if step.calls]
    denoisers = {calls[-1].component for calls in loops}
    every = [{call.component for call in calls} - denoisers for calls in loops]
    return tuple(sorted(set.intersection(*every))) if every else ()


def outputs_beside(step: Step, components: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """What these components answered last in a step, for :class:`fewstep.recording.watch.observation.Stub`."""
    return tuple((name, call_of(step, name).output) for name in components)


def stand_in(components: tuple[str, ...], runs: Sequence[Sequence[Step]]) -> Stub:
    """What stands in for the networks of a loop, and for what it calls beside them: their answers in its first step."""
    first = runs[0][0]
    return Stub(components, first.calls[-1].output, beside=outputs_beside(first, components_beside(*runs)))


def call_of(step: Step, component: str) -> NetworkCall:
    """The last call of a component in a step."""
    return next(call for call in reversed(step.calls) if call.component == component)


def refuse_shared(component: str, network: nn.Module, denoisers: Mapping[str, nn.Module]) -> None:
    """Refuse a second network that is made of a denoiser's own weights: a student's would change what it answers.

    Raises:
        RecordingError: a weight stands in both.
    """
    own = {id(weight) for weight in network.parameters()}
    for name, denoiser in denoisers.items():
        shared = sum(id(weight) in own for weight in denoiser.parameters())
        if shared:
            raise RecordingError(
                f"{component} ({type(network).__name__}) is made of {shared} weights of {name} itself, so that a "
                f"student's training would change what it answers; distil the pipeline without {component}"
            )


def fit_second(
    component: str, network: nn.Module, runs: list[list[Step]], live: list[Step]
) -> tuple[SecondNetwork, list[list[Step]]]:
    """How a component is called beside the denoiser, and the runs without what the denoiser is told of its answers.

    Args:
        component: its name.
        network: itself.
        runs: as :func:`fewstep.recording.rules.item_fit.fit_entries` has them.
        live: those of their steps in which nothing was stubbed.

    Raises:
        RecordingError: its answers do not reach the denoiser as they are, or its arguments cannot be explained.
    """
    steps = [step for run in runs for step in run]
    denoiser = steps[0].calls[-1].component
    links = tuple(_links(component, steps))
    if not links:
        raise RecordingError(
            f"the loop calls {component} beside {denoiser}, and no argument of {denoiser} is what it answers; "
            "several networks in one step are distilled only where one is told the other's answers as they are"
        )
    if all(_is_zero(call_of(step, component).output) for step in live):
        raise RecordingError(
            f"{component} answers with nothing but zeros: it steers nothing; are its weights untrained, or its scale 0?"
        )
    own = [[replace(step, calls=[call_of(step, component)]) for step in run] for run in runs]
    switch = _switch(component, [step for run in own for step in run])
    if switch is not None:
        own = [[_without(step, {switch.argument}) for step in run] for run in own]
    sample, times = fit_entries(component, own)
    second = SecondNetwork(component, network, dtype_name(network_dtype(network)), sample, times, links, switch)
    told = {link.argument for link in links}
    return second, [[_without(step, told) for step in run] for run in runs]


def _links(component: str, steps: Sequence[Step]) -> Iterator[Link]:
    """Each argument of the denoiser that is a part of the component's answer in every step."""
    for name, value in steps[0].calls[-1].arguments.items():
        form = "tensor" if isinstance(value, Tensor) else type(value).__name__
        if form not in ("tensor", "list", "tuple", "dict"):
            continue
        for path in _paths(call_of(steps[0], component).output):
            link = Link(name, path, form)
            if all(_carries(link, step, component) for step in steps):
                yield link
                break


def _carries(link: Link, step: Step, component: str) -> bool:
    value = step.calls[-1].arguments.get(link.argument)
    try:
        answer = link.value(call_of(step, component).output)
    except IndexError:
        return False
    parts = [answer] if isinstance(answer, Tensor) else parts_of(answer)
    holds = bool(parts) and all(isinstance(part, Tensor) for part in parts)
    return holds and not differs(value, answer)


def _paths(output: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """The ways to all parts of an answer, that to the whole first."""
    yield path
    for position, part in enumerate(parts_of(output)):
        yield from _paths(part, (*path, position))


def _switch(component: str, steps: Sequence[Step]) -> Switch | None:
    """The argument of a component, called last in these steps, that is 0 in some of them and one number in the others.

    That its answers are zeros there, the proof sees.

    Raises:
        RecordingError: an argument is 0 in some steps and several numbers in the others.
    """
    for name in changing_arguments(steps):
        values = [step.calls[-1].arguments[name] for step in steps]
        numbers = [value if isinstance(value, list) else [value] for value in values]
        if not all(isinstance(number, int | float) for own in numbers for number in own):
            continue
        on = [value for value, own in zip(values, numbers, strict=True) if any(own)]
        if len(on) == len(values):
            continue
        if any(value != on[0] for value in on):
            raise RecordingError(
                f"the argument {name} of {component} follows the step's number and does more than switch it on and "
                "off, as several controls with ends of their own do; give all of them the same, or none"
            )
        return Switch(name, on[0])
    return None


def _without(step: Step, arguments: set[str]) -> Step:
    """A step whose last call lacks these arguments."""
    last = step.calls[-1]
    kept = {name: value for name, value in last.arguments.items() if name not in arguments}
    return replace(step, calls=[*step.calls[:-1], replace(last, arguments=kept)])


def _is_zero(output: Any) -> bool:
    """Whether an answer is zeros through and through."""
    if isinstance(output, Tensor):
        return not bool(output.count_nonzero())
    return all(_is_zero(part) for part in parts_of(output))
