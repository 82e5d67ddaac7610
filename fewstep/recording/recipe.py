"""The recipe: how a network is called so that its answer is what its pipeline hands to `scheduler.step`.

A recipe is plain data, and it knows no model family: it says under which argument the sample goes and in which shape,
which arguments carry the time and by which arithmetic, and what is done to the output.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.dtypes import network_dtype


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
    """

    argument: str
    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    as_list: bool
    dtype: str
    pad_axis: int = 0
    pad: tuple[int, int] = (0, 0)
    fill: float = 0.0

    def value(self, x: Tensor) -> Tensor | list[Tensor]:
        """The argument for x (B, *sample_shape)."""
        if self.permutation:
            x = x.permute(self.permutation)
        x = x.reshape(x.shape[0], *self.shape)
        if self.pad_axis:
            sides = [0, 0] * (x.dim() - 1 - self.pad_axis) + list(self.pad)
            x = torch.nn.functional.pad(x, sides, value=self.fill)
        return list(x.unbind(0)) if self.as_list else x


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
    """

    argument: str
    source: str
    arithmetic: str
    operations: tuple[tuple[str, float], ...]
    dtype: str
    to_integer: str = "round"
    rows: int = 1
    shape: tuple[int, ...] = ()

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
    """

    element: int
    stack: bool
    half_axis: int
    permutation: tuple[int, ...]
    shape: tuple[int, ...]
    relation: str
    scale: float = 1.0
    floor: float = 0.0

    def tensor(self, output: Any) -> Tensor:
        """The network's answer (B, *shape), before the relation."""
        value = output
        if self.element >= 0:
            value = (list(output.values()) if isinstance(output, dict) else output)[self.element]
        if self.stack:
            value = torch.stack(list(value))
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
        if self.relation == "velocity":
            chain.append(f"(x - output) / max(t/{self.scale:g}, {self.floor:g})")
        else:
            chain.append(self.relation)
        return ", ".join(chain)


@dataclass(frozen=True)
class Recipe:
    """How to call a network, as data.

    Attributes:
        component: the pipeline component's name.
        sample_shape: per-sample shape of x and of the answer in the scheduler's space.
        sample: where x goes.
        times: where the time goes (one rule or two: a network may also be told the next time).
        output: what is done to the answer.
        network_dtype: the dtype's name of the recorded network's weights. What had that dtype follows a network of
            another one (a student in float32 beside a teacher in bfloat16).
    """

    component: str
    sample_shape: tuple[int, ...]
    sample: SampleRule
    times: tuple[TimeRule, ...]
    output: OutputRule
    network_dtype: str

    @property
    def needs_next(self) -> bool:
        """Whether the network is also told the next time, so that `call` wants `next_timestep`."""
        return any(rule.source == "next" for rule in self.times)

    def call(
        self,
        network: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        *,
        next_timestep: Tensor | None = None,
        continuous: bool = False,
    ) -> Tensor:
        """What the pipeline would hand to `scheduler.step` for each sample; (B, *sample_shape), differentiable.

        Args:
            network: the recorded network or any of the same class.
            x: (B, *sample_shape), what the network is given (after any `scale_model_input`).
            timestep: (B,) float64, the scheduler's timesteps; a batch may mix times.
            conditioning: for B samples.
            next_timestep: (B,) float64, for networks that are also told where the step ends.
            continuous: feed float times even to a network recorded with integer ones.

        Raises:
            ValueError: shapes or batch sizes that do not agree, or a missing `next_timestep`.
        """
        if tuple(x.shape[1:]) != self.sample_shape or timestep.shape != x.shape[:1]:
            raise ValueError(
                f"the recipe wants x (B, {', '.join(map(str, self.sample_shape))}) and timestep (B,), "
                f"not {tuple(x.shape)} and {tuple(timestep.shape)}"
            )
        if conditioning.batch_size != x.shape[0]:
            raise ValueError(
                f"conditioning for {conditioning.batch_size} samples, x for {x.shape[0]}; select() expands it"
            )
        recorded = getattr(torch, self.network_dtype)
        own = network_dtype(network)

        def followed(dtype: torch.dtype) -> torch.dtype:
            return own if dtype == recorded else dtype

        arguments = conditioning.arguments()
        if own != recorded:
            arguments = conditioning.map_tensors(lambda v: v.to(followed(v.dtype))).arguments()
        arguments[self.sample.argument] = self.sample.value(x.to(followed(getattr(torch, self.sample.dtype))))
        for rule in self.times:
            at = timestep if rule.source == "timestep" else next_timestep
            if at is None:
                raise ValueError(f"the network is also told the next time ({rule.argument}); pass next_timestep")
            value = rule.numbers(at.to(x.device), continuous=continuous)
            dtype = getattr(torch, rule.dtype)
            if dtype.is_floating_point:
                # Not narrowed: in bfloat16 the timestep 750 is 752.
                value = value.to(torch.promote_types(dtype, followed(dtype)))
            elif continuous:
                value = value.to(torch.promote_types(x.dtype, torch.float32))
            value = value.repeat_interleave(rule.rows) if rule.rows > 1 else value
            for size in rule.shape:
                value = value.unsqueeze(-1).expand(*value.shape, size)
            arguments[rule.argument] = value
        return self.output.model_output(network(**arguments), x, timestep.to(x.device))

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: not the JSON of a recipe.
        """
        try:
            data = json.loads(text)
            sample = {**data["sample"], **_tuples(data["sample"], "permutation", "shape", "pad")}
            output = {**data["output"], **_tuples(data["output"], "permutation", "shape")}
            times = [
                {**t, "shape": tuple(t["shape"]), "operations": tuple((name, n) for name, n in t["operations"])}
                for t in data["times"]
            ]
            return cls(
                component=data["component"],
                sample_shape=tuple(data["sample_shape"]),
                sample=SampleRule(**sample),
                times=tuple(TimeRule(**t) for t in times),
                output=OutputRule(**output),
                network_dtype=data["network_dtype"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the JSON of a recipe ({error})") from error


def _tuples(data: dict[str, Any], *names: str) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(data[name]) for name in names}
