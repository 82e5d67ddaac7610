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
from fewstep.recording.entries import entries_from_json
from fewstep.recording.rules import OutputRule, SampleRule, TimeRule

#: Of the JSON; 1 knew no entries.
VERSION = 2


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
    def read(self) -> Tensor:
        """Which entries of a sample the network is told: bool, *sample_shape. The others are never looked at."""
        return self.sample.read(self.sample_shape)

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
        own_x = x.to(followed(getattr(torch, self.sample.dtype)))
        arguments[self.sample.argument] = self.sample.value(own_x, arguments.get(self.sample.argument))
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
            arguments[rule.argument] = rule.value(value, arguments.get(rule.argument))
        return self.output.model_output(network(**arguments), x, timestep.to(x.device))

    def to_json(self) -> str:
        """The recipe as JSON text."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote, here or in a version that knew no entries.

        Raises:
            ValueError: not the JSON of a recipe, or of a later version.
        """
        try:
            data = json.loads(text)
            if data.get("version", 1) > VERSION:
                raise ValueError(
                    f"the recipe has version {data['version']}, and this fewstep reads {VERSION}; update it"
                )
            sample = {**data["sample"], **_tuples(data["sample"], "permutation", "shape", "pad")}
            output = {**data["output"], **_tuples(data["output"], "permutation", "shape")}
            for rule in (sample, output):
                rule["entries"] = entries_from_json(rule.get("entries"))
            times = [
                {
                    **t,
                    "shape": tuple(t["shape"]),
                    "operations": tuple((name, n) for name, n in t["operations"]),
                    "moving": tuple((first, length) for first, length in t.get("moving", ())),
                }
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
