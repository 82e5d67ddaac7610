"""The denoisers of a pipeline's loop, and what a step asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.loop.call_parts import answers, network_calls, split_pieces
from fewstep.recording.loop.experts import Expert, Visits, components_of
from fewstep.recording.recipe import Recipe
from fewstep.recording.watch.observation import NetworkCall, Step, Stub


@dataclass(frozen=True, eq=False)
class Denoisers:
    """The networks that share a pipeline's loop by time, usually one, and how the pipeline calls them.

    Attributes:
        experts: the networks, from noise to data.
        recipe: how each of them is called.
        marked: the conditioning of one sample with guidance off, its leaves marked.
        stub: stands in for all of them, for one sample.
        visits: a run of the pipeline that meets each of several; None for one.
    """

    experts: tuple[Expert, ...]
    recipe: Recipe
    marked: dict[str, Any]
    stub: Stub
    visits: Visits | None

    @property
    def unguided(self) -> Conditioning:
        """The conditioning of one sample with guidance off."""
        return Conditioning(self.marked, 1)

    @property
    def networks(self) -> list[nn.Module]:
        """Their modules, from noise to data."""
        return [expert.network for expert in self.experts]

    def alone(self, expert: Expert) -> Denoisers:
        """One of them, as if it were the only one."""
        return replace(self, experts=(expert,), visits=None)

    def calls(self, step: Step) -> list[NetworkCall]:
        """Their calls in a step, of whichever of them was called there."""
        return network_calls(step, components_of(self.experts))

    def pieces(self, step: Step) -> list[Conditioning]:
        """The conditioning of each answer that a step asked for, one sample each, in the pipeline's order."""
        return split_pieces(self.calls(step), self.recipe, self.marked)

    def answers(self, step: Step) -> list[Tensor]:
        """Each answer in a step at one sample, as `model_output` would be without guidance; (1, *sample_shape)."""
        return answers(self.calls(step), self.recipe, step)
