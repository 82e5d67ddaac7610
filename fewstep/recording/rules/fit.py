"""Fitting the recipe's rules to what a run showed, by value and never by an argument's name."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.rules.dtypes import dtype_name
from fewstep.recording.rules.rules import OutputRule, SampleRule, TimeRule
from fewstep.recording.watch.observation import Step


def fit_sample(component: str, steps: list[Step]) -> SampleRule:
    """The argument that equals the network input in value in every step: as it is, reshaped, permuted, or as a list."""
    first = steps[0].calls[-1].arguments
    for name, value in first.items():
        as_list = isinstance(value, list) and bool(value) and all(isinstance(v, Tensor) for v in value)
        if as_list and len({v.shape for v in value}) > 1:
            continue
        if not as_list and not isinstance(value, Tensor):
            continue
        tensor = torch.stack(value) if as_list else value
        x = steps[0].network_input
        if not tensor.is_floating_point() or tensor.numel() < x.numel() or tensor.shape[:1] != x.shape[:1]:
            continue
        for rule in _sample_rules(name, x, tensor, as_list):
            if all(_carries(rule, step) for step in steps):
                return rule
    raise RecordingError(
        f"no argument of {component} equals the sample that the scheduler is given "
        f"({', '.join(first)}): the pipeline scales it by itself, or mixes something into it, between its scheduler "
        f"and its network, which no stock scheduler does; {ANOTHER}"
    )


def _sample_rules(name: str, x: Tensor, tensor: Tensor, as_list: bool) -> Iterator[SampleRule]:
    """The ways in which x may have become `tensor`: reordered, reshaped, or with a constant before or behind it."""
    dtype = dtype_name(tensor.dtype)
    if tensor.numel() == x.numel():
        for order in _orders(x, tensor.shape):
            yield SampleRule(name, order, tuple(tensor.shape[1:]), as_list, dtype)
        return
    for axis in range(1, tensor.dim()):
        if (x.numel() * tensor.shape[axis]) % tensor.numel():
            continue
        size = x.numel() * tensor.shape[axis] // tensor.numel()
        spare = tensor.shape[axis] - size
        for before in dict.fromkeys((0, spare)):
            rest = torch.cat([tensor.narrow(axis, 0, before), tensor.narrow(axis, before + size, spare - before)], axis)
            if bool((rest != rest.flatten()[0]).any()):
                continue
            inner = tensor.narrow(axis, before, size)
            for order in _orders(x, inner.shape):
                pad, fill = (before, spare - before), float(rest.flatten()[0])
                yield SampleRule(name, order, tuple(inner.shape[1:]), as_list, dtype, axis, pad, fill)


def _carries(rule: SampleRule, step: Step) -> bool:
    value = step.calls[-1].arguments[rule.argument]
    if rule.as_list and (not isinstance(value, list) or len(value) != step.network_input.shape[0]):
        return False
    tensor = torch.stack(value) if rule.as_list else value
    expected = rule.value(step.network_input.to(tensor.dtype))
    expected = torch.stack(expected) if isinstance(expected, list) else expected
    return expected.shape == tensor.shape and torch.equal(expected, tensor)


def fit_times(component: str, sample: str, runs: list[list[Step]], two: dict[str, Any]) -> tuple[TimeRule, ...]:
    """One rule for each argument, besides the sample, that changes between the steps of a run.

    Args:
        runs: the steps of two runs with different step counts, one sample each. On an even grid a line through the next
            time fits one run as well as a line through the time itself; both runs together tell them apart.
        two: the network's arguments at two samples, which show how the time's shape depends on the batch.
    """
    first = [step.calls[-1].arguments for step in runs[0]]
    changing = [
        name for name in first[0] if name != sample and any(differs(first[0][name], a[name]) for a in first[1:])
    ]
    rules = []
    for name in changing:
        columns = [[_time_value(component, name, step.calls[-1].arguments[name]) for step in run] for run in runs]
        rows, shape = _time_shape(component, name, first[0][name], two[name])
        # The last step's, because some pipelines let the sample, and the time with it, change dtype after the first.
        dtype = time_dtype(first[-1][name])
        rules.append(fit_time(component, name, runs, columns, dtype, rows, shape))
    if not any(rule.source == "timestep" for rule in rules):
        raise RecordingError(
            f"no argument of {component} follows the scheduler's timestep "
            f"({'changing: ' + ', '.join(changing) if changing else 'nothing changes between steps'}); "
            f"a network without a time cannot be distilled: {ANOTHER}"
        )
    return tuple(rules)


def differs(a: Any, b: Any) -> bool:
    """Whether two values of an argument are not the same, containers included."""
    if a is b:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape != b.shape or not torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(differs(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) != len(b) or any(differs(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is not type(b) or (not isinstance(a, Tensor) and a != b)


def _time_value(component: str, name: str, value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    if (
        isinstance(value, Tensor)
        and value.numel()
        and not value.is_complex()
        and bool((value == value.flatten()[0]).all())
    ):
        return float(value.flatten()[0])
    raise RecordingError(
        f"the argument {name} of {component} changes between steps and is not one time per sample; "
        f"conditioning that follows the trajectory cannot be recorded: switch it off in the call, or {ANOTHER}"
    )


def time_dtype(value: Any) -> torch.dtype:
    """The dtype of a time argument, of a plain number that of its kind."""
    if isinstance(value, Tensor):
        return value.dtype
    return torch.float64 if isinstance(value, float) else torch.int64


def _time_shape(component: str, name: str, one: Any, two: Any) -> tuple[int, tuple[int, ...]]:
    """Rows per sample and further axes of a time argument, from its shapes at one and at two samples.

    A scalar, or one entry whatever the batch, becomes one time per sample: every network takes that, training needs it.
    """
    if not isinstance(one, Tensor) or one.dim() == 0:
        return 1, ()
    if two.shape[0] == 2 * one.shape[0]:
        return one.shape[0], tuple(one.shape[1:])
    if one.shape[0] == 1:
        return 1, tuple(one.shape[1:])
    raise RecordingError(
        f"the time argument {name} of {component} has shape {list(one.shape)} for one sample and {list(two.shape)} for "
        f"two; which entry belongs to which sample cannot be told: {ANOTHER}"
    )


def fit_time(
    component: str,
    name: str,
    runs: list[list[Step]],
    columns: list[list[float]],
    dtype: torch.dtype,
    rows: int,
    shape: tuple[int, ...],
    moving: tuple[tuple[int, int], ...] = (),
) -> TimeRule:
    """The rule by which an argument follows the time, or the next one.

    Args:
        component: the network, and
        name: its argument, for messages.
        runs: the steps of two runs with different step counts.
        columns: what the argument was in each step of each.
        dtype: of the argument.
        rows: of `TimeRule`, as
        shape: and
        moving: are.

    Raises:
        RecordingError: it follows neither by a simple rule.
    """
    current = [step.timestep for run in runs for step in run]
    values = [v for column in columns for v in column]
    following = [step.timestep for run in runs for step in run[1:]]
    before_last = [v for column in columns for v in column[:-1]]
    for source, x, y in (("timestep", current, values), ("next", following, before_last)):
        rule = _fit_line(name, source, x, y, dtype, rows, shape)
        if rule is not None:
            return replace(rule, moving=moving)
    seen = ", ".join(f"{v:g} at {t:g}" for t, v in zip(current[:4], values[:4], strict=True))
    raise RecordingError(
        f"the argument {name} of {component} changes between steps, but by no simple rule of the scheduler's timestep "
        f"({seen}); no stock scheduler can feed such a time: {ANOTHER}"
    )


def _fit_line(
    name: str, source: str, x: list[float], y: list[float], dtype: torch.dtype, rows: int, shape: tuple[int, ...]
) -> TimeRule | None:
    """The rule that reproduces y from x bit for bit, or to a few roundings of its dtype; None when there is none."""
    times, values = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    design = torch.stack([times, torch.ones_like(times)], dim=1)
    slope, offset = torch.linalg.lstsq(design, values[:, None]).solution[:, 0].tolist()
    wanted = values.to(dtype)
    closest: TimeRule | None = None
    own = (dtype_name(dtype),) if dtype.is_floating_point else ()
    arithmetics = ("float64", *own, "float32", "bfloat16", "float16")
    # A cast to an integer or to half precision moves the values, so that their line is only roughly known.
    rounding = torch.finfo(dtype).eps * values.abs().max().item() if dtype.is_floating_point else 1.0
    near = max(1e-3, rounding)
    for operations in _lines(slope, offset, near):
        for arithmetic, to_integer in itertools.product(dict.fromkeys(arithmetics), ("round", "trunc")):
            rule = TimeRule(name, source, arithmetic, operations, dtype_name(dtype), to_integer, rows, shape)
            got = rule.numbers(times)
            if torch.equal(got, wanted):
                return rule
            if dtype.is_floating_point and closest is None:
                error = (got.double() - wanted.double()).abs()
                size = wanted.double().abs()
                # In full precision a few roundings of the largest value; in half precision one of each value.
                allowed = 4 * size.max() if dtype.itemsize >= 4 else size
                if bool((error <= torch.finfo(dtype).eps * allowed).all()):
                    closest = rule
    return closest


def _lines(slope: float, offset: float, near: float) -> Iterator[tuple[tuple[str, float], ...]]:
    """The lines near slope * t + offset, the simplest first: pipelines compute with round numbers."""
    whole = round(1 / abs(slope)) if abs(slope) > 1e-9 else 0
    simple = bool(whole) and abs(abs(slope) * whole - 1) < 1e-2
    if simple and slope > 0 and abs(offset) < near:
        yield () if whole == 1 else (("div", float(whole)),)
    if simple and slope < 0 and abs(offset - 1) < near:
        yield ("div", float(whole)), ("rsub", 1.0)
        yield ("rsub", float(whole)), ("div", float(whole))
    if whole == 1 and slope < 0:
        yield (("rsub", float(round(offset))),)
    multiple = round(slope)
    if multiple > 1 and abs(slope - multiple) < 1e-2 * multiple and abs(offset) < near * multiple:
        yield (("mul", float(multiple)),)
    yield ("mul", slope), ("add", offset)


def fit_output(component: str, steps: list[Step]) -> OutputRule:
    """The chain from the network's return value to `model_output` that holds in every step."""
    output, target = steps[0].calls[-1].output, steps[0].model_output
    for element, value in elements(output):
        stack = isinstance(value, list)
        if stack and not all(isinstance(v, Tensor) for v in value):
            continue
        tensor = torch.stack(value) if stack else value
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.shape[:1] != target.shape[:1]:
            continue
        for half_axis in _half_axes(tensor, target):
            kept = tensor.narrow(half_axis, 0, tensor.shape[half_axis] // 2) if half_axis else tensor
            for order in _orders(kept, target.shape):
                rule = OutputRule(element, stack, half_axis, order, tuple(target.shape[1:]), "same")
                for candidate in (rule, replace(rule, relation="negated"), _velocity(rule, steps)):
                    if candidate is not None and all(_yields(candidate, step) for step in steps):
                        return candidate
    raise RecordingError(
        f"the output of {component} is not what the scheduler is given, nor its negative, its first half or a "
        "reordering of it; the pipeline changes it in a way that cannot be recorded: switch off in the call what "
        f"changes it, or {ANOTHER}"
    )


def _velocity(rule: OutputRule, steps: list[Step]) -> OutputRule | None:
    """The rule for a network that predicts x0 under a pipeline that makes a velocity of it, or None.

    The pipeline hands on (x - output) / span, with span = max(timestep / scale, floor). The span is measured in every
    step; `steps` must reach small times, for only these show the floor.
    """
    spans = []
    for step in steps:
        x = step.network_input
        if x.numel() != step.model_output.numel():
            return None
        answer = rule.tensor(step.calls[-1].output).double().flatten()
        target = step.model_output.double().flatten()
        difference = x.double().flatten() - answer
        span = (difference @ difference / (difference @ target)).item()
        if not 0 < span < float("inf") or (difference / span - target).abs().max() > 1e-5 * target.abs().max():
            return None
        spans.append(span)
    ratios = [step.timestep / span for step, span in zip(steps, spans, strict=True)]
    scale = max(ratios)
    scale = float(round(scale)) if abs(round(scale) - scale) < 1e-4 * scale else scale
    floor = min(spans)
    if all(abs(step.timestep / scale - span) < 1e-4 * span for step, span in zip(steps, spans, strict=True)):
        floor = 0.0
    return replace(rule, relation="velocity", scale=scale, floor=float(f"{floor:.6g}"))


def elements(output: Any) -> list[tuple[int, Any]]:
    """The parts of what a network returned, with their positions; -1: it returned the part itself."""
    if isinstance(output, dict):
        return list(enumerate(output.values()))
    if isinstance(output, tuple):
        return list(enumerate(output))
    return [(-1, output)]


def _half_axes(tensor: Tensor, target: Tensor) -> list[int]:
    """0 where the sizes agree, else the axes of which half is the target's size."""
    if tensor.numel() == target.numel():
        return [0]
    if tensor.numel() == 2 * target.numel():
        return [axis for axis in range(1, tensor.dim()) if tensor.shape[axis] % 2 == 0]
    return []


def _yields(rule: OutputRule, step: Step) -> bool:
    got = rule.model_output(step.calls[-1].output, step.network_input, torch.tensor([step.timestep]))
    wanted = step.model_output
    if got.shape != wanted.shape:
        return False
    scale = wanted.double().abs().max()
    return bool((got.double() - wanted.double()).abs().max() <= 1e-6 * scale) and bool(scale > 0)


def _orders(x: Tensor, shape: torch.Size) -> Iterator[tuple[int, ...]]:
    """Orders of x's axes after which it could be reshaped to `shape` (axes of one come and go); as it is first."""
    yield ()
    squeezed = [n for n in shape[1:] if n != 1]
    identity = tuple(range(x.dim()))
    for rest in itertools.permutations(identity[1:]):
        order = (0, *rest)
        if order != identity and [x.shape[a] for a in rest if x.shape[a] != 1] == squeezed:
            yield order
