"""What a relative of a student's pipeline tells its network, beside what the student's own pipeline tells it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.export.errors import ExportError
from fewstep.export.related.stubs import Heard, StandIns
from fewstep.export.walk.trace import Trace
from fewstep.recording.watch.observation import NetworkCall

# Of sorted values of size one, by what the sample's dtype leaves of them.
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


class OtherTaskError(ExportError):
    """A relative that asks of its network what the student was not trained for, at every strength."""


@dataclass(frozen=True)
class Form:
    """The form of a network's call.

    Attributes:
        shapes: of the tensors, by their place in the arguments.
        times: the arguments that carry the time.
        sample: the argument that carries the sample.
    """

    shapes: dict[str, tuple[int, ...]]
    times: frozenset[str]
    sample: str

    def other_than(self, own: Form) -> set[str]:
        """What differs from the student's own form and may: a time for every part of the picture.

        Raises:
            OtherTaskError: anything else differs.
        """
        remarks = set()
        for place in sorted(self.shapes.keys() | own.shapes.keys(), key=lambda place: _argument(place) != own.sample):
            here, there = self.shapes.get(place), own.shapes.get(place)
            if here == there:
                continue
            if here is not None and there is not None and _argument(place) in own.times:
                remarks.add("it tells a time for every part of the picture, and the student was told one for all")
                continue
            if here is None:
                raise OtherTaskError(f"it tells its network no {place}, which the student was told")
            if there is None:
                raise OtherTaskError(f"it tells its network {place}, which the student was never told")
            raise OtherTaskError(
                f"it tells its network {place} of shape {list(here)}, and the student's are {list(there)}"
            )
        return remarks


def form_of(call: NetworkCall, times: frozenset[str], sample: str) -> Form:
    """The form of a call; see :class:`Form`."""
    return Form({place: tuple(tensor.shape) for place, tensor in _tensors(call.arguments)}, times, sample)


def share(one: Heard, two: Heard) -> float:
    """The part of what was told that differs between two runs of other pictures: 1 is as much as other noise would."""
    if len(one.calls) != len(two.calls):
        return 1.0
    parts = [0.0]
    for first, second in zip(one.calls, two.calls, strict=True):
        others = dict(_tensors(second.arguments))
        for place, tensor in _tensors(first.arguments):
            other = others.get(place)
            if other is None or other.shape != tensor.shape:
                return 1.0
            if tensor.is_floating_point():
                size = max(float(tensor.double().norm()), float(other.double().norm()), 1e-12)
                parts.append(float((tensor.double() - other.double()).norm()) / size / math.sqrt(2))
    return max(parts)


def starts_from(seen: Trace, time: float, stand_ins: StandIns, initial_scale: float) -> float | None:
    """How much of picture 1 is in the first sample: alpha of its time, or 0 for noise alone; None: it is neither.

    Args:
        seen: a run with that picture.
        time: its first.
        stand_ins: whose picture it is.
        initial_scale: what the student's own unit noise is multiplied with.
    """
    schedule, first = stand_ins.recording.schedule, seen.steps[0]
    t = torch.tensor([time], dtype=torch.float64)
    x = first.network_input.double().cpu()
    x = x / expand(schedule.input_scale(t), x)
    draws = [draw.value.double().cpu().flatten() for draw in seen.initial_draws]
    close = _CLOSE.get(first.sample.dtype, 1e-3)
    picture = stand_ins.picture(1)
    if x.shape == picture.shape:
        alpha, sigma = (float(value) for value in schedule.coefficients(t))
        noise = ((x - alpha * picture) / sigma).flatten()
        if any(_same_values(noise, draw, close) for draw in draws):
            return alpha
    if any(_same_values(x.flatten() / initial_scale, draw, close) for draw in draws):
        return 0.0
    return None


def _same_values(values: Tensor, draw: Tensor, close: float) -> bool:
    """Whether all values are among the drawn numbers; packing reorders them, and a pinned frame leaves some out."""
    if values.numel() > draw.numel():
        return False
    draw, values = draw.sort().values, values.sort().values
    if values.numel() == draw.numel():
        return bool((values - draw).abs().max() <= close)
    above = torch.searchsorted(draw, values).clamp(1, draw.numel() - 1)
    away = torch.minimum((draw[above] - values).abs(), (draw[above - 1] - values).abs())
    return bool(away.max() <= close)


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, each with its place: ``added_cond_kwargs.time_ids``."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _tensors(inner, f"{place}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _tensors(inner, f"{place}.{index}")


def _argument(place: str) -> str:
    return place.partition(".")[0]
