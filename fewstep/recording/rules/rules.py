"""The three rules of a recipe: where the sample goes, where the time goes, and what is done to the network's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.recording.rules.entries import Entries, entries_from_json


@dataclass(frozen=True)
class SampleRule:
    """Where the sample goes: axes permuted (the batch axis stays first), reshaped, padded, perhaps split into a list.

    Attributes:
        argument: the network's argument.
        permutation: the order of all axes, batch included, of (B, *sample_shape); empty: as they are.
        shape: the per-sample shape that the network is given, before padding.
        as_list: the network takes a list of B tensors instead of one tensor.
        dtype: the recorded dtype's name.
        pad_axis: the axis (batch included) along which a constant stands before and after the sample, such as the empty
            image condition of a network that could take one; 0: none.
        pad: entries before and after.
        fill: the constant.
        entries: where the sample stands among entries that are an item's own (its picture), or which part of it is
            read; None: the argument is the sample and nothing else, as the fields above say.
    """

    argument: str
    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    as_list: bool
    dtype: str
    pad_axis: int = 0
    pad: tuple[int, int] = (0, 0)
    fill: float = 0.0
    entries: Entries | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> SampleRule:
        """What `dataclasses.asdict` made of a rule, read from JSON again."""
        entries = entries_from_json(data.get("entries"))
        return cls(**{**data, **tuples(data, "permutation", "shape", "pad"), "entries": entries})

    def value(self, x: Tensor, rest: Tensor | None = None) -> Tensor | list[Tensor]:
        """The argument for x (B, *sample_shape), and for what :meth:`rest` kept of it."""
        if self.entries is not None:
            x = self.entries.put(x, rest)
            return list(x.unbind(0)) if self.as_list else x
        if self.permutation:
            x = x.permute(self.permutation)
        x = x.reshape(x.shape[0], *self.shape)
        if self.pad_axis:
            sides = [0, 0] * (x.dim() - 1 - self.pad_axis) + list(self.pad)
            x = torch.nn.functional.pad(x, sides, value=self.fill)
        return list(x.unbind(0)) if self.as_list else x

    def rest(self, value: Tensor | list[Tensor]) -> Tensor | None:
        """What of the argument's value (B samples) is not the sample's; None: nothing."""
        if self.entries is None:
            return None
        return self.entries.rest(torch.stack(value) if isinstance(value, list) else value)

    def read(self, sample_shape: tuple[int, ...]) -> Tensor:
        """Which entries of a sample the argument holds: bool of its shape."""
        return torch.ones(sample_shape, dtype=torch.bool) if self.entries is None else self.entries.read(sample_shape)

    def unread(self, sample_shape: tuple[int, ...]) -> Tensor | None:
        """Which entries of a sample the argument does not hold: bool of its shape; None where it holds them all."""
        return None if self.entries is None else self.entries.unread(sample_shape)


@dataclass(frozen=True)
class TimeRule:
    """How one time argument is computed from the scheduler's timestep.

    Attributes:
        argument: the network's argument.
        source: "timestep", or "next" for the timestep of the following step.
        arithmetic: the dtype's name in which the operations are done, so that their rounding is the pipeline's own.
        operations: pairs (name, number), applied in order: mul, div, add, rsub (number - value).
        dtype: the dtype's name that the network is given.
        to_integer: "round" or "trunc" before a cast to an integer dtype.
        rows: entries of the leading axis per sample.
        shape: the further axes (frames), all holding the same time.
        moving: (first, length) of the entries that follow the time, flattened per sample with its rows; the others are
            an item's own, such as the 0 of a frame that is clean. (): all of them follow it.
    """

    argument: str
    source: str
    arithmetic: str
    operations: tuple[tuple[str, float], ...]
    dtype: str
    to_integer: str = "round"
    rows: int = 1
    shape: tuple[int, ...] = ()
    moving: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, data: dict[str, Any]) -> TimeRule:
        """What `dataclasses.asdict` made of a rule, read from JSON again."""
        operations = tuple((name, number) for name, number in data["operations"])
        moving = tuple((first, length) for first, length in data.get("moving", ()))
        return cls(**{**data, **tuples(data, "shape"), "operations": operations, "moving": moving})

    def value(self, numbers: Tensor, rest: Tensor | None = None) -> Tensor:
        """The argument (B * rows, *shape) for the network's times (B,), and for what :meth:`rest` kept of it."""
        if self.moving and rest is not None:
            flat = rest.to(numbers.device, numbers.dtype).reshape(len(numbers), -1)
            return torch.where(self._moves(flat), numbers[:, None], flat).reshape(rest.shape)
        value = numbers.repeat_interleave(self.rows) if self.rows > 1 else numbers
        for size in self.shape:
            value = value.unsqueeze(-1).expand(*value.shape, size)
        return value

    def rest(self, value: Any) -> Tensor | None:
        """What of the argument's value does not follow the time, and zeros where it does; None: nothing."""
        if not self.moving:
            return None
        flat = value.reshape(len(value) // self.rows, -1)
        return torch.where(self._moves(flat), 0, flat).reshape(value.shape)

    def _moves(self, flat: Tensor) -> Tensor:
        places = torch.arange(flat.shape[1], device=flat.device)
        runs = [(places >= first) & (places < first + length) for first, length in self.moving]
        return torch.stack(runs).any(0)

    def numbers(self, timestep: Tensor, *, continuous: bool = False) -> Tensor:
        """The network's time (B,) for the scheduler's timesteps (B,) float64.

        With `continuous`, nothing is rounded, so that a derivative with respect to the time is not lost.
        """
        dtype = getattr(torch, self.dtype)
        value = timestep if continuous else timestep.to(getattr(torch, self.arithmetic))
        for name, number in self.operations:
            value = _OPERATIONS[name](value, number)
        if dtype.is_floating_point:
            return value if continuous else value.to(dtype)
        if continuous:
            return value
        # Times come from float64 arithmetic: 665.99999 is 666, and a plain cast would make it 665.
        nearest = value.double().round()
        near = (value.double() - nearest).abs() < 1e-6
        if self.to_integer == "trunc":
            nearest = torch.where(near, nearest, value.double().trunc())
        return nearest.to(dtype)

    def describe(self) -> str:
        """The rule as a formula."""
        text = "t" if self.source == "timestep" else "t_next"
        for i, (name, number) in enumerate(self.operations):
            text = _FORMULAS[name].format(f"({text})" if i and name != "rsub" else text, f"{number:g}")
        if not getattr(torch, self.dtype).is_floating_point:
            text = f"{self.to_integer}({text})" if self.operations or self.to_integer == "trunc" else text
        per = "" if self.rows == 1 else f", {self.rows} rows per sample"
        per += "" if not self.shape else f", over {list(self.shape)}"
        per += "" if not self.moving else f", {sum(length for _, length in self.moving)} entries of them"
        return f"{self.argument} = {text} ({self.dtype}{per})"


_OPERATIONS = {
    "mul": lambda value, number: value * number,
    "div": lambda value, number: value / number,
    "add": lambda value, number: value + number,
    "rsub": lambda value, number: number - value,
}
_FORMULAS = {"mul": "{0}*{1}", "div": "{0}/{1}", "add": "{0} + {1}", "rsub": "{1} - {0}"}


@dataclass(frozen=True)
class OutputRule:
    """From the network's return value to `model_output`: pick, stack, halve, permute, reshape, then the relation.

    Attributes:
        element: position in a returned tuple (or output class); -1: the network returns the tensor or list itself.
        stack: the value is a list of B tensors.
        half_axis: the axis of which only the first half is kept; 0: none.
        permutation: order of all axes, batch included; empty: as they are.
        shape: the per-sample shape of `model_output`.
        relation: "same", "negated", or "velocity": the network predicts x0 and the pipeline makes
            (x - x0) / max(timestep / scale, floor) of it.
        scale: see `relation`.
        floor: see `relation`.
        entries: which entries of the value `model_output` is, where it is no reordered whole or half.
    """

    element: int
    stack: bool
    half_axis: int
    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    relation: str
    scale: float = 1.0
    floor: float = 0.0
    entries: Entries | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> OutputRule:
        """What `dataclasses.asdict` made of a rule, read from JSON again."""
        entries = entries_from_json(data.get("entries"))
        return cls(**{**data, **tuples(data, "permutation", "shape"), "entries": entries})

    def tensor(self, output: Any) -> Tensor:
        """The network's answer (B, *shape), before the relation."""
        value = output
        if self.element >= 0:
            value = (list(output.values()) if isinstance(output, dict) else output)[self.element]
        if self.stack:
            value = torch.stack(list(value))
        if self.entries is not None:
            return self.entries.pick(value).reshape(len(value), *self.shape)
        if self.half_axis:
            value = value.narrow(self.half_axis, 0, value.shape[self.half_axis] // 2)
        if self.permutation:
            value = value.permute(self.permutation)
        return value.reshape(value.shape[0], *self.shape)

    def model_output(self, output: Any, x: Tensor, timestep: Tensor) -> Tensor:
        """What the pipeline hands to `scheduler.step`: (B, *shape)."""
        value = self.tensor(output)
        if self.relation == "negated":
            return -value
        if self.relation == "velocity":
            span = (timestep / self.scale).clamp(min=self.floor).to(value.dtype)
            return (x.reshape(value.shape) - value) / span.view(-1, *[1] * (value.dim() - 1))
        return value

    def describe(self) -> str:
        """The chain in words."""
        chain = [f"element {self.element}"] if self.element > 0 else []
        chain += ["stack the list"] if self.stack else []
        chain += [f"first half of axis {self.half_axis}"] if self.half_axis else []
        chain += [f"axes {list(self.permutation)}"] if self.permutation else []
        chain += [self.entries.describe()] if self.entries is not None else []
        if self.relation == "velocity":
            chain.append(f"(x - output) / max(t/{self.scale:g}, {self.floor:g})")
        else:
            chain.append(self.relation)
        return ", ".join(chain)


def tuples(data: dict[str, Any], *names: str) -> dict[str, tuple[Any, ...]]:
    """These of the values that JSON holds as lists, as tuples."""
    return {name: tuple(data[name]) for name in names}
