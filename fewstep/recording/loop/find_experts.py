"""Finding the networks that share a pipeline's loop by time, and the exact times at which they change.

Which network is called when is learnt by leading the pipeline through times of our choice, in no order, while every
network is stubbed: a pipeline that decides by the time alone shows one interval for each of them, and its bounds are
narrowed down until no number lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from fewstep.diffusion.schedule import NoiseSchedule, TableSchedule
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.loop.call_parts import equal, without_sample
from fewstep.recording.loop.experts import Expert, Visits, expert_at
from fewstep.recording.pipeline import modules_of
from fewstep.recording.recipe import Recipe
from fewstep.recording.watch.observation import Step, Stub
from fewstep.recording.watch.observe import lead
from fewstep.recording.watch.subject import Subject

# Times in one run through times of our choice. The first run finds every interval longer than its share of [0, 1].
_FED = 256
# Step counts to try until each expert is visited often enough by the pipeline's own grid, and how often that is.
_COUNTS, _ENOUGH = (5, 9, 17, 33, 65, 129, 257, 513), 3


def loop_components(subject: Subject, first: str, *runs: list[Step], beside: Sequence[str] = ()) -> tuple[str, ...]:
    """The components that the loop calls, `first` (that of the first step) before the others.

    The first step of a run does not count: it also holds the text encoders. Nor does a component of `beside`.

    Raises:
        RecordingError: several in one step.
    """
    found = {first: None}
    for step in (step for run in runs for step in run[1:]):
        names = {call.component for call in step.calls} - set(beside)
        if len(names) > 1:
            main = first if first in names else step.calls[-1].component
            raise RecordingError(
                f"the loop of {subject} calls {', '.join(sorted(names - {main}))} beside {main}; "
                "pipelines with several denoisers in one step cannot be distilled, nor with a network that is called "
                f"in some steps only: switch the others off in the call, or {ANOTHER}"
            )
        found |= dict.fromkeys(names)
    return tuple(found)


def find_experts(
    subject: Subject, names: tuple[str, ...], runs: list[list[Step]], schedule: NoiseSchedule
) -> tuple[Expert, ...]:
    """The experts from noise to data, with the exact bounds of their intervals.

    Args:
        subject: the pipeline, with guidance off.
        names: the components that its loop calls; one: nothing needs to be found.
        runs: the pipeline's own runs, which must agree with what is found.
        schedule: of the network's input.

    Raises:
        RecordingError: which one is called does not follow from the time alone.
    """
    networks = modules_of(subject.pipeline)
    if len(names) == 1:
        return (Expert(names[0], networks[names[0]], -torch.inf),)
    stub = Stub(names, runs[0][0].calls[-1].output)
    is_table = isinstance(schedule, TableSchedule)

    def called(times: Tensor) -> dict[float, str]:
        # In no order, so that a loop that counts its steps shows itself.
        order = torch.randperm(len(times), generator=torch.Generator().manual_seed(0))
        fed = times[order].long() if is_table else times[order].float()
        steps = lead(subject.pipeline, subject.call(len(fed)), fed, stub)
        return {step.timestep: _only(subject, names, step) for step in steps}

    even = torch.cat([torch.tensor([1e-4]), torch.arange(1, _FED) / (_FED - 1)]).double()
    found = called(schedule.timestep(schedule.snap(even)).unique())
    found |= {step.timestep: _only(subject, names, step) for run in runs for step in run}
    order, bounds = _intervals(subject, names, found)
    while any(len(_between(low, high, 1, is_table)) for low, high in bounds):
        times = torch.cat([_between(low, high, _FED // len(bounds), is_table) for low, high in bounds])
        found |= called(times)
        order, bounds = _intervals(subject, names, found)
    lowest = [high for _, high in bounds] + [-torch.inf]
    return tuple(Expert(name, networks[name], low) for name, low in zip(order, lowest, strict=True))


def find_visits(subject: Subject, experts: Sequence[Expert], stub: Stub) -> Visits:
    """The shortest run of the pipeline in which every expert answers a few times after the first step.

    Raises:
        RecordingError: an interval is too narrow for that.
    """
    for count in _COUNTS:
        steps = subject.run(count, steps=count, stub=stub).steps
        places = [
            [i for i, step in enumerate(steps) if i > 0 and expert_at(experts, step.timestep) is e] for e in experts
        ]
        if all(len(own) >= _ENOUGH for own in places):
            return Visits(count, frozenset([0, *(i for own in places for i in (own[0], own[1], own[-1]))]))
    rarest = experts[min(range(len(experts)), key=lambda k: len(places[k]))].component
    raise RecordingError(
        f"{subject} calls {rarest} fewer than {_ENOUGH} times in {_COUNTS[-1]} steps, "
        "too seldom to prove how it is called; give it more of the steps (boundary_ratio of the pipeline), or none"
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
                f"{', '.join(odd)}; networks that are called in different ways cannot be distilled together yet: "
                f"{ANOTHER}"
            )


def _only(subject: Subject, names: tuple[str, ...], step: Step) -> str:
    """The one denoiser of a step."""
    called = [call.component for call in step.calls if call.component in names]
    if len(called) != 1:
        raise RecordingError(
            f"{subject} does not call exactly one of {', '.join(names)} at timestep "
            f"{step.timestep:g} with guidance off; it cannot be recorded: {ANOTHER}"
        )
    return called[0]


def _intervals(
    subject: Subject, names: tuple[str, ...], found: dict[float, str]
) -> tuple[list[str], list[tuple[float, float]]]:
    """The components in descending time, and between two the highest time of the lower and the lowest of the upper."""
    pieces = [(name, list(part)) for name, part in groupby(sorted(found, reverse=True), key=found.__getitem__)]
    order = [name for name, _ in pieces]
    if len(set(order)) != len(order):
        raise RecordingError(
            f"the loop of {subject} calls {', '.join(names)}, and which one does not follow from the "
            "time alone, one interval for each; several denoisers are distilled only where they are split by time: "
            f"{ANOTHER}"
        )
    return order, [(lower[0], upper[-1]) for (_, upper), (_, lower) in pairwise(pieces)]


def _between(low: float, high: float, count: int, integers: bool) -> Tensor:
    """Up to `count` numbers strictly between two, of those that a scheduler of the family can pass."""
    middle = torch.linspace(low, high, count + 2, dtype=torch.float64)[1:-1]
    numbers = middle.round() if integers else middle.float().double()
    return numbers[(numbers > low) & (numbers < high)].unique()
