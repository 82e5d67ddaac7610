"""Feeding a network: its arguments for samples of any time, from what it is told beside these, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.tree import map_plain
from fewstep.recording.rules.dtypes import network_dtype
from fewstep.recording.rules.rules import SampleRule, TimeRule


def feed(
    network: nn.Module,
    sample: SampleRule,
    times: Sequence[TimeRule],
    recorded: str,
    told: dict[str, Any],
    x: Tensor,
    timestep: Tensor,
    next_timestep: Tensor | None = None,
    continuous: bool = False,
) -> dict[str, Any]:
    """The keyword arguments of a network for B samples.

    Args:
        network: that is called.
        sample: where x goes.
        times: where the time goes.
        recorded: the dtype's name of the recorded network's weights. What had that dtype follows the network's own.
        told: its other arguments, and what beside x and the time stands in theirs.
        x: (B, *sample_shape).
        timestep: (B,) float64, the scheduler's timesteps.
        next_timestep: (B,) float64, for networks that are also told where the step ends.
        continuous: float times even for a network recorded with integer ones.

    Raises:
        ValueError: a missing `next_timestep`.
    """
    own, then = network_dtype(network), getattr(torch, recorded)

    def followed(dtype: torch.dtype) -> torch.dtype:
        return own if dtype == then else dtype

    arguments = dict(told) if own == then else map_plain(told, lambda v: v.to(followed(v.dtype)))
    own_x = x.to(followed(getattr(torch, sample.dtype)))
    arguments[sample.argument] = sample.value(own_x, arguments.get(sample.argument))
    for rule in times:
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
        arguments[rule.argument] = rule.value(value, arguments.get(rule.argument))
    return arguments


def unfed(
    arguments: Mapping[str, Any], sample: SampleRule, times: Sequence[TimeRule], left_out: Collection[str] = ()
) -> dict[str, Any]:
    """What :func:`feed` takes as `told`, of the arguments that it makes.

    Args:
        arguments: of a network in a step.
        sample: where x stands in them.
        times: where the time does.
        left_out: arguments that come from elsewhere.

    Raises:
        ValueError: an argument that holds the sample has no room for it.
    """
    rules: dict[str, SampleRule | TimeRule] = {rule.argument: rule for rule in times}
    rules[sample.argument] = sample
    told = {name: value for name, value in arguments.items() if name not in rules and name not in left_out}
    rests = {name: rule.rest(arguments[name]) for name, rule in rules.items() if name in arguments}
    return told | {name: rest for name, rest in rests.items() if rest is not None}
