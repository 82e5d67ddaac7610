"""What was learnt of a pipeline: the facts, and what follows from them alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Form, Item
from fewstep.diffusion.intervals import TimeIntervals
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.recording.call.invocation import Invocation
from fewstep.recording.call.items import as_items, check_items
from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance.formula import GuidedCall
from fewstep.recording.guidance.report import GuidanceReport
from fewstep.recording.items.between_steps import BetweenSteps
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.learning import Told
from fewstep.recording.labels import count_labels
from fewstep.recording.loop.experts import Expert, Visits, components_of, expert_at
from fewstep.recording.pipeline import evaluating
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.dtypes import network_dtype
from fewstep.recording.telling import name_of, tell, tell_guided
from fewstep.recording.watch.subject import Subject


@dataclass(frozen=True, eq=False, repr=False)
class Recorded:
    """How a pipeline calls its denoiser, learnt from the pipeline itself.

    Attributes:
        pipeline: the recorded pipeline, as it was.
        component: the denoiser's name in the pipeline; of several experts that of the noisiest times.
        network: the denoiser of that name.
        invocation: how the pipeline is called.
        recipe: how the network is called.
        schedule: alpha and sigma of the network's input.
        prediction_type: what the recipe's answer is ("epsilon", "v_prediction", "sample", "flow", "edm", "edm_v").
        guidance: what was seen of the pipeline's guidance.
        initial_noise_scale: what the pipeline multiplies unit noise with at its first step, in the network's input.
        off: the changes to the call that switch guidance off.
        guided: how the guided call is made, None without classifier-free guidance.
        marked: the conditioning of one sample, its leaves marked; the pattern of every other one.
        embedded: the arguments that follow an embedded guidance.
        experts: the networks that share the loop by time, from noise to data; usually one. The recipe holds for each.
        visits: a run of the pipeline that meets each of several experts; None for one.
        told: what pictures, items and draws change of what the network is told; None for prompts and labels.
        between: what the pipeline does to items' samples outside of the network; None: nothing.
        sizes: the same at other sizes of its items' samples (:mod:`.sizes`); each holds for one size.
        keys: of the items that it holds for, by :meth:`Invocation.size_key`; none where nobody looked for sizes.
        check: holds each item to the recipe; None for prompts and labels.
    """

    pipeline: Any
    component: str
    network: nn.Module
    invocation: Invocation
    recipe: Recipe
    schedule: NoiseSchedule
    prediction_type: str
    guidance: GuidanceReport
    initial_noise_scale: float
    off: dict[str, Any]
    guided: GuidedCall | None
    marked: dict[str, Any]
    embedded: set[str]
    experts: tuple[Expert, ...]
    visits: Visits | None = None
    told: Told | None = None
    between: BetweenSteps | None = None
    sizes: tuple[Recorded, ...] = ()
    keys: frozenset[Form] = frozenset()
    check: ItemCheck | None = None
    _negative: Conditioning | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.pipeline).__name__}, {self.component}, sample_shape={self.sample_shape})"
        )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The per-sample shape of x in the scheduler's space."""
        return self.recipe.sample_shape

    @property
    def call(self) -> dict[str, Any]:
        """The pipeline's keyword arguments that the recording holds for, those of prompts, labels and items apart."""
        return dict(self.invocation.call)

    @property
    def inputs(self) -> dict[str, str]:
        """The arguments of the pipeline's call that are an item's own, and what each is, in words; {} without items."""
        if self.conditional != "item":
            return {}
        each = [one.invocation.item.forms for one in (self, *self.sizes)]
        return {name: " or ".join(dict.fromkeys(forms[name] for forms in each)) for name in each[0]}

    @property
    def conditional(self) -> str | None:
        """ "prompt", "label", "item" (pictures with a prompt or without one) or None."""
        return self.invocation.conditional

    @property
    def subject(self) -> Subject:
        """The pipeline as it was observed, with guidance off, to be observed again."""
        second = [] if self.recipe.second is None else [self.recipe.second.component]
        return Subject(self.pipeline, self.invocation, self.off, (*self.components, *second))

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all experts in the pipeline, from noise to data."""
        return components_of(self.experts)

    def expert_at(self, timestep: float) -> Expert:
        """Which expert the pipeline calls at a scheduler's timestep."""
        return expert_at(self.experts, timestep)

    @property
    def intervals(self) -> TimeIntervals:
        """Where in [0, 1] each expert is called."""
        bounds = [torch.tensor([expert.lowest], dtype=torch.float64) for expert in self.experts[:-1]]
        return TimeIntervals(self.schedule, (*(float(self.schedule.time(bound)) for bound in bounds), 0.0))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks of all experts by component."""
        return {expert.component: expert.network for expert in self.experts}

    def of(self, expert: Expert) -> Self:
        """This recording as if the pipeline had only this expert: how one network is called, at all times."""
        return replace(
            self,
            component=expert.component,
            network=expert.network,
            recipe=self.recipe.called(expert.component),
            experts=(replace(expert, lowest=-torch.inf),),
            visits=None,
            sizes=tuple(one.of(expert) for one in self.sizes),
        )

    def on(self, networks: Mapping[str, nn.Module]) -> Self:
        """This recording with other networks in a copy of its pipeline, those of all experts among them."""
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**networks)
        experts = tuple(replace(expert, network=networks[expert.component]) for expert in self.experts)
        sizes = tuple(one.on(networks) for one in self.sizes)
        return replace(self, pipeline=pipeline, network=networks[self.component], experts=experts, sizes=sizes)

    def for_item(self, item: Any) -> Recorded:
        """The one of these that holds for the size of an item's samples.

        Raises:
            RecordingError: none of several does.
        """
        for one in (self, *self.sizes):
            if not self.sizes or self.invocation.size_key(item) in one.keys:
                return one
        raise RecordingError(f"{item} is of a size that was not among those which the teacher was recorded with")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        return network_dtype(self.network)

    def condition_each(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        items: Sequence[Item | Mapping[str, Any]] | None = None,
    ) -> list[Conditioning]:
        """The conditioning of each prompt, label or item, each encoded alone, as users sample; runs the encoders only.

        Args:
            prompts: for a pipeline that takes such.
            labels: likewise.
            items: likewise, for a recording that was made with items.

        Raises:
            RecordingError: prompts for a pipeline that takes labels or nothing, and the like.
        """
        asked = self._asked(prompts, labels, items)
        if self.conditional is None:
            return [Conditioning(self.marked, 1)] * len(asked)
        return [tell(self.for_item(one), one) for one in asked]

    def draw_each(self, items: Sequence[Item | Mapping[str, Any]], seed: int) -> list[Conditioning]:
        """`condition_each` of items as another seed draws it: 0 is that of `condition_each`.

        They differ where the pipeline samples an encoder's distribution or adds noise to a picture (`told.draws`).
        """
        return [tell(self.for_item(item), item, seed) for item in self._asked(None, None, items)]

    def condition(
        self,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        items: Sequence[Item | Mapping[str, Any]] | None = None,
    ) -> Conditioning:
        """`condition_each` as one batch.

        Raises:
            RecordingError: as there, or the items' shapes differ; the message lists which.
        """
        asked = self._asked(prompts, labels, items)
        each = self.condition_each(prompts, labels, items)
        odd = [i for i, c in enumerate(each) if not Conditioning.compatible(each[0], c)]
        if odd:
            reason = Conditioning.mismatch(each[0], each[odd[0]])
            listed = ", ".join(name_of(asked[i]) for i in odd[:5]) + (", ..." if len(odd) > 5 else "")
            raise RecordingError(
                f"these cannot form one batch with {name_of(asked[0])}: {listed} ({reason}); batch items of equal "
                "shapes (condition_each)"
            )
        return Conditioning.cat(each)

    def negative_each(self, items: Sequence[Item | Mapping[str, Any]], seed: int = 0) -> list[tuple[Conditioning, ...]]:
        """What the network is told for the further answers of each item, each encoded alone; () without guidance.

        Args:
            items: for a recording that was made with items.
            seed: of what the pipeline draws, as in :meth:`draw_each`.

        Raises:
            RecordingError: as of :meth:`condition_each`.
        """
        return [answers[1:] for answers in self.guided_each(items, seed)]

    def guided_each(self, items: Sequence[Item | Mapping[str, Any]], seed: int = 0) -> list[tuple[Conditioning, ...]]:
        """What the network is told in a guided step of each item, the positive answer first; () without guidance.

        What is drawn may not be what :meth:`draw_each` gives: some pipelines draw for each answer.
        """
        asked = self._asked(None, None, items)
        return [tell_guided(self.for_item(item), item, seed) for item in asked]

    @property
    def further(self) -> int:
        """How many answers guidance leads away from; 0 without classifier-free guidance."""
        return 0 if self.guided is None else len(self.guided.order) - 1

    def negative(self) -> Conditioning | None:
        """The negative conditioning that the pipeline itself uses (batch 1); None without classifier-free guidance."""
        return self._negative

    def label_count(self) -> int | None:
        """How many class labels the network knows, the null label apart; None where nothing shows it."""
        if self.conditional != "label":
            return None
        return count_labels(self.network, self.invocation.item, self.probe, self._negative)

    @torch.no_grad()
    def probe(self, device: torch.device | str | None = None) -> Tensor:
        """The network's answer (1, *sample_shape) to zeros at half time, told what it was told in the recording.

        It runs once, in eval mode, so that hooks see what happens inside it.

        Args:
            device: where the network lies; None: where its first parameter does.
        """
        device = next(self.network.parameters()).device if device is None else device
        x = torch.zeros(1, *self.sample_shape, dtype=self.dtype, device=device)
        time = self.schedule.timestep(torch.full((1,), 0.5, dtype=torch.float64))
        told = Conditioning(self.marked, 1).to(device=device)
        with evaluating(self.network):
            return self.recipe.call(self.network, x, time, told, next_timestep=time / 2)

    def _asked(
        self,
        prompts: Sequence[str] | None,
        labels: Sequence[int] | None,
        items: Sequence[Item | Mapping[str, Any]] | None,
    ) -> list[Any]:
        kind = type(self.pipeline).__name__
        if sum(given is not None for given in (prompts, labels, items)) > 1:
            raise RecordingError("more than one of prompts, labels and items were given; a pipeline takes one of them")
        words = {"prompt": "prompts", "label": "class labels", "item": "items"}
        given, name = next(
            ((given, name) for given, name in ((prompts, "prompt"), (labels, "label"), (items, "item")) if given),
            ((), ""),
        )
        if isinstance(prompts, str):
            raise RecordingError("prompts must be a list of strings, not one string")
        if not given:
            if self.conditional is None:
                return [None]
            raise RecordingError(f"{kind} is conditioned on a {self.conditional}; give at least one")
        if self.conditional is None:
            raise RecordingError(f"{kind} is conditioned on nothing: it takes neither prompts nor labels")
        if name != self.conditional:
            raise RecordingError(f"{kind} takes {words[self.conditional]}, not {words[name]}")
        if name != "item":
            return list(given)
        found = as_items(items or ())
        check_items(type(self.pipeline), [self.invocation.item, *found], self.call)
        return found
