"""The rules of a network that is told a picture: which entries of its arguments are the sample's, and which the time's.

Seen in runs whose scheduler returns fresh noise. What is neither, and stands still, is an item's own or the same for
all; what is neither and does not stand still cannot be recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.rules.dtypes import dtype_name
from fewstep.recording.rules.entries import Entries, as_entries, copies
from fewstep.recording.rules.fit import differs, elements, fit_output, fit_time, time_dtype
from fewstep.recording.rules.rules import OutputRule, SampleRule, TimeRule
from fewstep.recording.watch.observation import Step

# So many steps tell entries apart, also in half precision, where single values repeat.
_STEPS = 8


class RedrawnError(RecordingError):
    """Entries beside the sample's that the pipeline draws anew in every step, or that follow the trajectory."""


def changing_arguments(steps: Sequence[Step]) -> list[str]:
    """The arguments of the network that are not the same in all of these steps, in the order of its call."""
    first, *others = [step.calls[-1].arguments for step in steps]
    return [name for name, value in first.items() if any(differs(value, other.get(name)) for other in others)]


def fit_entries(component: str, runs: list[list[Step]]) -> tuple[SampleRule, tuple[TimeRule, ...]]:
    """The rule of the sample and those of the time, from two runs of one item with different step counts.

    Raises:
        RecordingError: an argument changes between the steps and is neither, or is passed in some of them alone, or
            the sample or the time is not found.
    """
    steps = [step for run in runs for step in run]
    _refuse_passed_sometimes(component, steps)
    samples, times, others = [], [], []
    for name in changing_arguments(steps):
        rule = fit_sample_entries(name, steps)
        if rule is not None:
            samples.append(rule)
            continue
        timed = _moving(name, steps)
        if timed is None:
            others.append(name)
        else:
            times.append((name, timed))
    if nested := [name for name in others if _is_nested(steps[0].calls[-1].arguments[name])]:
        raise RecordingError(
            f"the argument {', '.join(nested)} of {component} changes between steps and is a list of lists (references "
            f"beside the sample?), which cannot be recorded: {ANOTHER}"
        )
    if others:
        raise RedrawnError(
            f"the argument {', '.join(others)} of {component} changes between steps and is neither the sample nor the "
            "time"
        )
    if len(samples) != 1:
        raise RecordingError(_unexplained(component, steps, [rule.argument for rule in samples]))
    rules = tuple(_time_rule(component, name, moving, runs) for name, moving in times)
    if not any(rule.source == "timestep" for rule in rules):
        raise RecordingError(
            f"no argument of {component} follows the scheduler's timestep "
            f"({', '.join(name for name, _ in times) or 'nothing but the sample'} changes between steps); a network "
            f"without a time cannot be distilled: {ANOTHER}"
        )
    return samples[0], rules


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, list) for one in value)


def _refuse_passed_sometimes(component: str, steps: Sequence[Step]) -> None:
    passed = [{name for name, value in step.calls[-1].arguments.items() if value is not None} for step in steps]
    if some := sorted({name for each in passed for name in each if any(name not in other for other in passed)}):
        raise RecordingError(
            f"{component} is told {', '.join(some)} in some of its steps and not in others (does it keep what it was "
            f"told in the first?), which cannot be recorded: {ANOTHER}"
        )


def fit_sample_entries(name: str, steps: Sequence[Step]) -> SampleRule | None:
    """The rule of an argument whose moving entries are all the sample's; None where none of them is.

    Raises:
        RecordingError: some are and some are not, or a sample stands in several rows.
    """
    values = [_stacked(step.calls[-1].arguments[name]) for step in steps]
    first = values[0]
    if first is None or not first.is_floating_point() or any(v is None or v.shape != first.shape for v in values):
        return None
    tensors = [value for value in values if value is not None]
    inputs = [step.network_input for step in steps]
    index = copies(tensors[-_STEPS:], inputs[-_STEPS:])
    # An entry of the sample that never moves is pinned there by the pipeline: the network is told the item's.
    index[(index >= 0) & ~_differing(inputs)[index.clamp(min=0)]] = -1
    if not bool((index >= 0).any()):
        return None
    if len(first) != len(inputs[0]):
        raise RecordingError(
            f"the argument {name} holds a sample in {len(first)} rows (each frame as a sample of its own), which "
            "cannot be recorded yet"
        )
    moving = _differing(tensors)
    if bool((moving & (index < 0)).any()):
        count = int((moving & (index < 0)).sum())
        raise RedrawnError(
            f"{count} entries of the argument {name} change in every step and are neither the sample's nor the time"
        )
    as_list = isinstance(steps[0].calls[-1].arguments[name], list)
    entries = as_entries(index, inputs[0].shape[1:], first.shape[1:])
    rule = SampleRule(name, (), entries.shape, as_list, dtype_name(first.dtype), entries=entries)
    return rule if all(carries(rule, step) for step in steps) else None


def carries(rule: SampleRule, step: Step) -> bool:
    """Whether an argument is what the rule makes of the sample and of what is not the sample's."""
    value = step.calls[-1].arguments[rule.argument]
    tensor = _stacked(value)
    if tensor is None:
        return False
    try:
        got = rule.value(step.network_input.to(tensor.dtype), rule.rest(value))
    except (ValueError, RuntimeError):
        return False  # another shape than the rule knows
    whole = torch.stack(got) if isinstance(got, list) else got
    return whole.shape == tensor.shape and torch.equal(whole, tensor)


def fit_output_entries(component: str, steps: list[Step]) -> OutputRule:
    """The chain from the network's return value to `model_output`: a selection of it, perhaps negated, or what
    :func:`fit_output` finds.

    Raises:
        RecordingError: there is none.
    """
    targets = [step.model_output for step in steps]
    asked, stepped = len(steps[0].network_input), len(targets[0])
    if stepped > asked and len(steps[0].sample) == stepped:
        raise RecordingError(
            f"what {component} answers for {asked} is handed to the scheduler in {stepped} rows (each frame as a "
            "sample of its own), which cannot be recorded yet"
        )
    for element, value in elements(steps[0].calls[-1].output):
        outputs = [_stacked(dict(elements(step.calls[-1].output))[element]) for step in steps]
        tensors = [output for output in outputs if output is not None and output.is_floating_point()]
        if len(tensors) < len(steps) or len(tensors[0]) != len(targets[0]):
            continue
        for relation, wanted in (("same", targets), ("negated", [-target for target in targets])):
            index = copies(wanted[:_STEPS], tensors[:_STEPS])
            if bool((index >= 0).all()):
                # Not the half that it may be here: another item's output may be longer.
                entries = as_entries(index, tensors[0].shape[1:], targets[0].shape[1:])
                rule = OutputRule(element, isinstance(value, list), 0, (), entries.shape, relation, entries=entries)
                return replace(rule, entries=None) if entries == Entries(entries.shape) else rule
    return fit_output(component, steps)


def moving_entries(values: Sequence[Any]) -> Tensor | None:
    """Which entries (flat) of an argument are not the same in all of these steps; None: no tensor of one shape."""
    tensors = [tensor for value in values if (tensor := _stacked(value)) is not None]
    if len(tensors) < len(values) or len({tensor.shape for tensor in tensors}) != 1:
        return None
    return _differing(tensors)


def _stacked(value: Any) -> Tensor | None:
    """A tensor, or a list of tensors of one shape as one; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(child, Tensor) for child in value):
        return torch.stack(value) if len({child.shape for child in value}) == 1 else None
    return value if isinstance(value, Tensor) and value.dim() > 0 else None


def _differing(values: Sequence[Tensor]) -> Tensor:
    """Which entries (flat) are not the same in all of these tensors of one shape."""
    moving = torch.zeros(values[0].numel(), dtype=torch.bool)
    for value in values[1:]:
        moving |= (value != values[0]).flatten().cpu()
    return moving


def _moving(name: str, steps: Sequence[Step]) -> tuple[Tensor | None, list[float]] | None:
    """Which entries of an argument move, and the one number that all of these are in each step; None: they are several.

    The entries are None where the argument is a plain number.
    """
    values = [step.calls[-1].arguments[name] for step in steps]
    if all(isinstance(value, int | float) for value in values):
        return None, [float(value) for value in values]
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_complex()]
    if len(tensors) < len(values) or len({tensor.shape for tensor in tensors}) > 1 or not tensors[0].numel():
        return None
    moving = _differing(tensors)
    moved = [tensor.flatten().cpu()[moving] for tensor in tensors]
    if any(bool((part != part[0]).any()) for part in moved):
        return None
    return moving, [float(part[0]) for part in moved]


def _time_rule(component: str, name: str, timed: tuple[Tensor | None, list[float]], runs: list[list[Step]]) -> TimeRule:
    moving, numbers = timed
    ends = list(itertools.accumulate(len(run) for run in runs))
    columns = [numbers[end - len(run) : end] for run, end in zip(runs, ends, strict=True)]
    # The last step's, because some pipelines let the sample, and the time with it, change dtype after the first.
    value = runs[0][-1].calls[-1].arguments[name]
    rows: int = 1
    shape: tuple[int, ...] = ()
    if isinstance(value, Tensor) and value.dim() > 0:
        rows, shape = len(value), tuple(value.shape[1:])
    still = () if moving is None or bool(moving.all()) else _runs(moving)
    return fit_time(component, name, runs, columns, time_dtype(value), rows, shape, still)


def _runs(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """(first, length) of the entries of a flat mask that are true."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return tuple((a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _unexplained(component: str, steps: Sequence[Step], samples: list[str]) -> str:
    if samples:
        return f"the sample is told to {component} twice, as {', '.join(samples)}; this cannot be recorded"
    listed = ", ".join(steps[0].calls[-1].arguments)
    return (
        f"no argument of {component} holds the sample that the scheduler is given ({listed}); the pipeline mixes "
        "something into all of its entries, and such a network cannot be recorded"
    )
