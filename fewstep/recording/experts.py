"""Experts: several networks that share a pipeline's loop by time, as Wan 2.2's two do. One network is the usual case.

Which network is called when is learnt by leading the pipeline through times of our choice, in no order, while every
network is stubbed: a pipeline that decides by the time alone shows one interval for each of them, and its bounds are
narrowed down until no number lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.schedule import NoiseSchedule, TableSchedule
from fewstep.recording.call_parts import equal, without_sample
from fewstep.recording.errors import RecordingError
from fewstep.recording.invocation import Invocation
from fewstep.recording.observation import Step, Stub
from fewstep.recording.observe import observe
from fewstep.recording.pipeline import modules_of
from fewstep.recording.recipe import Recipe

# Times in one run through times of our choice. The first run finds every interval longer than its share of [0, 1].
_FED = 256
# Step counts to try until each expert is visited often enough by the pipeline's own grid, and how often that is.
_COUNTS, _ENOUGH = (5, 9, 17, 33, 65, 129, 257, 513), 3


@dataclass(frozen=True, eq=False)
class Expert:
    """One network of a pipeline's loop.

    Attributes:
        component: its name in the pipeline.
        network: itself.
        lowest: the lowest scheduler's timestep (a float32 number) at which the pipeline calls it; -inf for the last.
    """

    component: str
    network: nn.Module
    lowest: float


@dataclass(frozen=True)
class Visits:
    """A run that meets every expert: its step count, and the steps in which the networks run (others are stubbed)."""

    count: int
    live: frozenset[int]

    def run_live(self, components: tuple[str, ...]) -> Stub:
        """What stands in for the networks in the other steps: their last answer."""
        return Stub(components, live=self.live)


def expert_at(experts: Sequence[Expert], timestep: float) -> Expert:
    """The expert that the pipeline calls at a scheduler's timestep. It compares float32 numbers, and so does this."""
    number = torch.tensor(timestep, dtype=torch.float64).float().item()
    return next(expert for expert in experts if number >= expert.lowest)


def components_of(experts: Sequence[Expert]) -> tuple[str, ...]:
    """Their names, from noise to data."""
    return tuple(expert.component for expert in experts)


def loop_components(pipeline: Any, first: str, *runs: list[Step]) -> tuple[str, ...]:
    """The components that the loop calls, `first` (that of the first step) before the others.

    The first step of a run does not count: it also holds the text encoders.

    Raises:
        RecordingError: several in one step.
    """
    found = {first: None}
    for step in (step for run in runs for step in run[1:]):
        names = {call.component for call in step.calls}
        if len(names) > 1:
            main = first if first in names else step.calls[-1].component
            raise RecordingError(
                f"the loop of {type(pipeline).__name__} calls {', '.join(sorted(names - {main}))} beside {main}; "
                "pipelines with several denoisers in one step or a control network cannot be distilled yet"
            )
        found |= dict.fromkeys(names)
    return tuple(found)


def find_experts(
    pipeline: Any, call: dict[str, Any], names: tuple[str, ...], runs: list[list[Step]], schedule: NoiseSchedule
) -> tuple[Expert, ...]:
    """The experts from noise to data, with the exact bounds of their intervals.

    Args:
        pipeline: of the recording.
        call: its unguided call for one sample; the step count is chosen here.
        names: the components that its loop calls; one: nothing needs to be found.
        runs: the pipeline's own runs, which must agree with what is found.
        schedule: of the network's input.

    Raises:
        RecordingError: which one is called does not follow from the time alone.
    """
    networks = modules_of(pipeline)
    if len(names) == 1:
        return (Expert(names[0], networks[names[0]], -torch.inf),)
    stub = Stub(names, runs[0][0].calls[-1].output)
    is_table = isinstance(schedule, TableSchedule)

    def called(times: Tensor) -> dict[float, str]:
        # In no order, so that a loop that counts its steps shows itself.
        order = torch.randperm(len(times), generator=torch.Generator().manual_seed(0))
        fed = times[order].long() if is_table else times[order].float()
        steps = observe(pipeline, {**call, "num_inference_steps": len(fed)}, stub=stub, times=fed).steps
        return {step.timestep: _only(pipeline, names, step) for step in steps}

    even = torch.cat([torch.tensor([1e-4]), torch.arange(1, _FED) / (_FED - 1)]).double()
    found = called(schedule.timestep(schedule.snap(even)).unique())
    found |= {step.timestep: _only(pipeline, names, step) for run in runs for step in run}
    order, bounds = _intervals(pipeline, names, found)
    while any(len(_between(low, high, 1, is_table)) for low, high in bounds):
        times = torch.cat([_between(low, high, _FED // len(bounds), is_table) for low, high in bounds])
        found |= called(times)
        order, bounds = _intervals(pipeline, names, found)
    lowest = [high for _, high in bounds] + [-torch.inf]
    return tuple(Expert(name, networks[name], low) for name, low in zip(order, lowest, strict=True))


def find_visits(
    pipeline: Any, invocation: Invocation, off: dict[str, Any], experts: Sequence[Expert], stub: Stub
) -> Visits:
    """The shortest run of the pipeline in which every expert answers a few times after the first step.

    Raises:
        RecordingError: an interval is too narrow for that.
    """
    for count in _COUNTS:
        call = invocation.arguments([invocation.item], count, **off)
        steps = observe(pipeline, call, steps=count, stub=stub).steps
        places = [
            [i for i, step in enumerate(steps) if i > 0 and expert_at(experts, step.timestep) is e] for e in experts
        ]
        if all(len(own) >= _ENOUGH for own in places):
            return Visits(count, frozenset([0, *(i for own in places for i in (own[0], own[1], own[-1]))]))
    rarest = experts[min(range(len(experts)), key=lambda k: len(places[k]))].component
    raise RecordingError(
        f"{type(pipeline).__name__} calls {rarest} fewer than {_ENOUGH} times in {_COUNTS[-1]} steps, "
        "too seldom to prove how it is called"
    )


def check_alike(experts: Sequence[Expert], steps: list[Step], recipe: Recipe | None = None) -> None:
    """Every expert must be told the same: the same arguments, and with a `recipe` their values, sample and time apart.

    Raises:
        RecordingError: one of them is called otherwise.
    """
    first = steps[0].calls[-1]
    for expert in experts[1:]:
        call = next(step.calls[-1] for step in steps if step.calls[-1].component == expert.component)
        odd = sorted(first.arguments.keys() ^ call.arguments.keys())
        if recipe is not None and not odd:
            ours, theirs = without_sample(first, recipe), without_sample(call, recipe)
            odd = [name for name in ours if not equal(ours[name], theirs[name])]
        if odd:
            raise RecordingError(
                f"{first.component} and {expert.component} share the loop by time, but are told different "
                f"{', '.join(odd)}; networks that are called in different ways cannot be distilled together yet"
            )


def _only(pipeline: Any, names: tuple[str, ...], step: Step) -> str:
    """The one denoiser of a step."""
    called = [call.component for call in step.calls if call.component in names]
    if len(called) != 1:
        raise RecordingError(
            f"{type(pipeline).__name__} does not call exactly one of {', '.join(names)} at timestep "
            f"{step.timestep:g} with guidance off; it cannot be recorded"
        )
    return called[0]


def _intervals(
    pipeline: Any, names: tuple[str, ...], found: dict[float, str]
) -> tuple[list[str], list[tuple[float, float]]]:
    """The components in descending time, and between two the highest time of the lower and the lowest of the upper."""
    pieces = [(name, list(part)) for name, part in groupby(sorted(found, reverse=True), key=found.__getitem__)]
    order = [name for name, _ in pieces]
    if len(set(order)) != len(order):
        raise RecordingError(
            f"the loop of {type(pipeline).__name__} calls {', '.join(names)}, and which one does not follow from the "
            "time alone, one interval for each; several denoisers are distilled only where they are split by time"
        )
    return order, [(lower[0], upper[-1]) for (_, upper), (_, lower) in pairwise(pieces)]


def _between(low: float, high: float, count: int, integers: bool) -> Tensor:
    """Up to `count` numbers strictly between two, of those that a scheduler of the family can pass."""
    middle = torch.linspace(low, high, count + 2, dtype=torch.float64)[1:-1]
    numbers = middle.round() if integers else middle.float().double()
    return numbers[(numbers > low) & (numbers < high)].unique()
