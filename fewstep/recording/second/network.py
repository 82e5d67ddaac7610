"""A second network in the step: a control network, whose answers the denoiser is told beside the sample.

It is a part of the denoiser's function that nobody trains: teacher, student and critic share it, and a gradient that
goes to the sample goes through it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.tree import map_plain
from fewstep.recording.errors import RecordingError
from fewstep.recording.rules.feeding import feed, unfed
from fewstep.recording.rules.rules import SampleRule, TimeRule

# A switch lies this share of the way from the last step on one side to the first one on the other: by so much may a
# time be rounded and still be on its own side.
_SLACK = 1e-3


@dataclass(frozen=True)
class Switch:
    """When a second network has a say: a pipeline counts its steps, and fewstep goes by the time of those.

    Attributes:
        argument: its argument that switches it: a scale that is 0 where it is off, and its answers with it.
        value: of that argument where it is on.
        lowest: it is on from this scheduler's timestep
        highest: to this one.
    """

    argument: str
    value: Any
    lowest: float = -torch.inf
    highest: float = torch.inf

    def on(self, timestep: Tensor) -> Tensor:
        """Whether it is on at timesteps (B,): bool (B,)."""
        return (timestep >= self.lowest) & (timestep <= self.highest)

    def at(self, steps: Sequence[tuple[float, bool]]) -> Switch:
        """The same, switched as in a walk.

        Args:
            steps: the timesteps of a whole walk, descending, and whether the network was on in each.

        Raises:
            RecordingError: it was never on, or more than once.
        """
        states = [on for _, on in steps]
        if not any(states):
            raise RecordingError(
                f"the control is never on in a walk of {len(steps)} steps ({self.argument}): give more steps"
            )
        if sum(now != then for now, then in pairwise([False, *states, False])) > 2:
            raise RecordingError(
                f"the control is switched on more than once in a walk ({self.argument}): give one start and one end"
            )
        first, last = states.index(True), len(states) - 1 - states[::-1].index(True)
        times = [timestep for timestep, _ in steps]
        lowest, highest = -torch.inf, torch.inf
        if last + 1 < len(times):
            lowest = times[last] - _SLACK * (times[last] - times[last + 1])
        if first > 0:
            highest = times[first] + _SLACK * (times[first - 1] - times[first])
        return dataclasses.replace(self, lowest=lowest, highest=highest)

    def agrees(self, steps: Sequence[tuple[float, bool]]) -> bool:
        """Whether it is on and off where a walk has it so; `steps` as in :meth:`at`."""
        times = torch.tensor([timestep for timestep, _ in steps], dtype=torch.float64)
        return self.on(times).tolist() == [on for _, on in steps]


@dataclass(frozen=True)
class Link:
    """An argument of the denoiser that is an answer of the second network.

    Attributes:
        argument: the denoiser's.
        path: positions that lead to it in what the second network returns; (): all of that.
        form: "tensor", "list", "tuple" or "dict", which the denoiser is given; a dict keeps its keys.
    """

    argument: str
    path: tuple[int, ...]
    form: str

    def value(self, output: Any) -> Any:
        """The argument, of what the second network returned."""
        for position in self.path:
            output = parts_of(output)[position]
        if self.form in ("tensor", "dict"):
            return output
        return (tuple if self.form == "tuple" else list)(parts_of(output))


@dataclass(frozen=True)
class SecondNetwork:
    """How a pipeline's second network is called in a step, and what the denoiser is told of its answers.

    Attributes:
        component: its name in the pipeline. What it is told of an item stands under that name in the conditioning.
        network: itself; never trained.
        network_dtype: the dtype's name of its weights when it was recorded.
        sample: where x goes.
        times: where the time goes.
        links: what the denoiser is told of its answers.
        switch: what switches it by the step's number; None: it is on in every step.
    """

    component: str
    network: nn.Module
    network_dtype: str
    sample: SampleRule
    times: tuple[TimeRule, ...]
    links: tuple[Link, ...]
    switch: Switch | None = None

    def told(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What its arguments hold beside x, the time and the switch.

        Raises:
            ValueError: an argument that holds the sample has no room for it.
        """
        switch = () if self.switch is None else (self.switch.argument,)
        return unfed(arguments, self.sample, self.times, switch)

    def answers(
        self,
        told: dict[str, Any],
        x: Tensor,
        timestep: Tensor,
        next_timestep: Tensor | None = None,
        continuous: bool = False,
    ) -> dict[str, Any]:
        """What the denoiser is told of it at x (B, *sample_shape) and timestep (B,), which may mix times."""
        arguments = feed(
            self.network,
            self.sample,
            self.times,
            self.network_dtype,
            told,
            x,
            timestep,
            next_timestep,
            continuous,
        )
        if self.switch is None:
            output = self.network(**arguments)
        else:
            # Off, its answers are zeros. So one call does for a batch in which it is on for some and off for others.
            output = self.network(**arguments, **{self.switch.argument: self.switch.value})
            on = self.switch.on(timestep.to(x.device))
            output = map_plain(output, lambda answer: _kept(answer, on))
        return {link.argument: link.value(output) for link in self.links}

    def about(self) -> dict[str, Any]:
        """All but the network, as JSON holds it."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "network"}

    @classmethod
    def of(cls, about: dict[str, Any], network: nn.Module) -> SecondNetwork:
        """What :meth:`about` gave, with its network."""
        return cls(
            component=about["component"],
            network=network,
            network_dtype=about["network_dtype"],
            sample=SampleRule.of(about["sample"]),
            times=tuple(TimeRule.of(rule) for rule in about["times"]),
            links=tuple(Link(link["argument"], tuple(link["path"]), link["form"]) for link in about["links"]),
            switch=None if about["switch"] is None else Switch(**about["switch"]),
        )

    def describe(self) -> str:
        """In words."""
        links = ", ".join(link.argument for link in self.links)
        text = f"{self.component} ({type(self.network).__name__}) gives {links}"
        if self.switch is None:
            return text
        first = "" if self.switch.highest == torch.inf else f" from timestep {self.switch.highest:.4g}"
        last = "" if self.switch.lowest == -torch.inf else f" down to timestep {self.switch.lowest:.4g}"
        return f"{text}; on{first}{last}"


def parts_of(output: Any) -> list[Any]:
    """What an answer of several parts consists of; [] of a tensor."""
    if isinstance(output, dict):
        return list(output.values())
    return list(output) if isinstance(output, list | tuple) else []


def _kept(answer: Tensor, on: Tensor) -> Tensor:
    """An answer (B * rows, ...) where it is on (B,), else zeros."""
    rows = on.repeat_interleave(len(answer) // len(on)) if len(answer) != len(on) else on
    return torch.where(rows.view(-1, *[1] * (answer.dim() - 1)), answer, torch.zeros_like(answer))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(child) for child in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
