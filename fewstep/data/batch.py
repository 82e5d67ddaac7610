"""One micro-batch of one step: what a method sees of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.draws import Draws


@dataclass
class Real:
    """Real samples: ``x0`` (B, ...) in the network's space and their own conditioning."""

    x0: Tensor
    conditioning: AnyConditioning


@dataclass
class Pairs:
    """Both ends of a teacher's ODE: ``x0`` (B, ...), the unit ``noise`` (B, ...) it was made of, and what for."""

    x0: Tensor
    noise: Tensor
    conditioning: AnyConditioning


class PairSource(Protocol):
    """Where a run's pairs come from: :mod:`fewstep.data.pairs`."""

    def batch(self, seed: int, positions: Sequence[int]) -> Pairs:
        """The pairs at these places of the run's endless, keyed stream."""
        ...


@dataclass
class Batch:
    """One micro-batch of one step.

    Attributes:
        size: B.
        shape: of one sample in the network's space.
        conditioning: of the B samples to generate.
        draws: every random number of the step.
        real: B real samples with conditioning of their own, None in a data-free run.
        logging: whether this step is logged; what is only looked at may cost network calls only then.
        pairs: B pairs with conditioning of their own, None where the method asked for none.
    """

    size: int
    shape: tuple[int, ...]
    conditioning: AnyConditioning
    draws: Draws
    real: Real | None
    logging: bool
    pairs: Pairs | None = None
