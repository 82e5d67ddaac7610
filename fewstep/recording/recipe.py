"""The recipe: how a network is called so that its answer is what its pipeline hands to `scheduler.step`.

A recipe is plain data, and it knows no model family: it says under which argument the sample goes and in which shape,
which arguments carry the time and by which arithmetic, and what is done to the output.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import OUTSIDE
from fewstep.recording.rules.feeding import feed
from fewstep.recording.rules.rules import OutputRule, SampleRule, TimeRule
from fewstep.recording.second.network import SecondNetwork

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
        second: a network that is called before it in every step, whose answers it is told; None: there is none.
        sizes: how it is called for samples of other shapes, where items have such.
    """

    component: str
    sample_shape: tuple[int, ...]
    sample: SampleRule
    times: tuple[TimeRule, ...]
    output: OutputRule
    network_dtype: str
    second: SecondNetwork | None = None
    sizes: tuple[Recipe, ...] = ()

    def of(self, shape: tuple[int, ...]) -> Recipe:
        """The recipe for samples of a shape; this one where there is none."""
        return next((one for one in self.sizes if one.sample_shape == shape), self)

    def called(self, component: str) -> Recipe:
        """The recipe for a component of another name, at every size."""
        return dataclasses.replace(self, component=component, sizes=tuple(one.called(component) for one in self.sizes))

    def calling(self, networks: Mapping[str, nn.Module]) -> Recipe:
        """The recipe for a pipeline's networks by name, of which one that an added module goes with calls that one."""
        return self

    @property
    def read(self) -> Tensor:
        """Which entries of a sample the network is told: bool, *sample_shape. The others are never looked at."""
        return self.sample.read(self.sample_shape)

    @property
    def unread(self) -> Tensor | None:
        """Which entries of a sample the network is never told: bool, *sample_shape; None where it is told them all."""
        return self.sample.unread(self.sample_shape)

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
            x: (B, *sample_shape), what the network is given (after any `scale_model_input`); or of a shape of `sizes`.
            timestep: (B,) float64, the scheduler's timesteps; a batch may mix times.
            conditioning: for B samples.
            next_timestep: (B,) float64, for networks that are also told where the step ends.
            continuous: feed float times even to a network recorded with integer ones.

        Raises:
            ValueError: shapes or batch sizes that do not agree, or a missing `next_timestep`.
        """
        if self.sizes and (own := self.of(tuple(x.shape[1:]))) is not self:
            return own.call(network, x, timestep, conditioning, next_timestep=next_timestep, continuous=continuous)
        if tuple(x.shape[1:]) != self.sample_shape or timestep.shape != x.shape[:1]:
            raise ValueError(
                f"the recipe wants x (B, {', '.join(map(str, self.sample_shape))}) and timestep (B,), "
                f"not {tuple(x.shape)} and {tuple(timestep.shape)}"
            )
        if conditioning.batch_size != x.shape[0]:
            raise ValueError(
                f"conditioning for {conditioning.batch_size} samples, x for {x.shape[0]}; select() expands it"
            )
        told = conditioning.arguments()
        told.pop(OUTSIDE, None)
        beside = {} if self.second is None else told.pop(self.second.component)
        at = (x, timestep, next_timestep, continuous)
        arguments = feed(network, self.sample, self.times, self.network_dtype, told, *at)
        if self.second is not None:
            arguments |= self.second.answers(beside, *at)
        return self.output.model_output(network(**arguments), x, timestep.to(x.device))

    def to_json(self) -> str:
        """The recipe as JSON text, the weights of a second network apart."""
        plain = dataclasses.asdict(dataclasses.replace(self, second=None, sizes=()))
        plain["second"] = None if self.second is None else self.second.about()
        plain["sizes"] = [json.loads(one.to_json()) for one in self.sizes]
        return json.dumps({"version": VERSION, **plain})

    @classmethod
    def from_json(cls, text: str, second: nn.Module | None = None) -> Recipe:
        """The recipe that `to_json` wrote, here or in a version that knew no entries.

        Args:
            text: JSON.
            second: the second network of a recipe that has one.

        Raises:
            ValueError: not the JSON of a recipe, or of a later version; or its second network is wanting.
        """
        try:
            data = json.loads(text)
            if data.get("version", 1) > VERSION:
                raise ValueError(
                    f"the recipe has version {data['version']}, and this fewstep reads {VERSION}; update it"
                )
            about = data.get("second")
            if about is not None and second is None:
                raise ValueError(f"the recipe calls a second network, {about['component']}; give it too")
            return cls(
                component=data["component"],
                sample_shape=tuple(data["sample_shape"]),
                sample=SampleRule.of(data["sample"]),
                times=tuple(TimeRule.of(rule) for rule in data["times"]),
                output=OutputRule.of(data["output"]),
                network_dtype=data["network_dtype"],
                second=None if about is None or second is None else SecondNetwork.of(about, second),
                sizes=tuple(cls.from_json(json.dumps(one), second) for one in data.get("sizes", ())),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the JSON of a recipe ({error})") from error
