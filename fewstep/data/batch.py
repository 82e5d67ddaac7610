"""One micro-batch of one step, which is what a method sees of the data, and what makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.draws import Draws, keyed_turn

Of = TypeVar("Of", covariant=True)

#: The stream of a run's sizes, one for each step.
SIZES = "sizes"

#: What samples were asked for: prompts, labels, or nothing.
Asked = Sequence[str] | Sequence[int] | None


def _nobody_said() -> Asked:
    return None


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


class Source(Protocol[Of]):
    """Where a part of every batch comes from: :mod:`.conditions`, :mod:`.real`, :mod:`.pairs`."""

    def batch(self, seed: int, positions: Sequence[int]) -> Of:
        """What lies at these places of the run's endless, keyed stream."""
        ...


@dataclass
class Batch:
    """One micro-batch of one step.

    Attributes:
        size: B.
        shape: of one sample in the network's space.
        conditioning: of the B samples to generate.
        draws: every random number of the step.
        given_real: see :attr:`real`; None in a run without.
        logging: whether this step is logged; what is only looked at may cost network calls only then.
        given_pairs: see :attr:`pairs`; None in a run without.
        per_step: how many samples the step has, those of all micro-batches and processes; 0 for B alone.
        asked_for: says what the B samples were asked for, see :attr:`asked`.
    """

    size: int
    shape: tuple[int, ...]
    conditioning: AnyConditioning
    draws: Draws
    given_real: Real | None
    logging: bool
    given_pairs: Pairs | None = None
    per_step: int = 0
    asked_for: Callable[[], Asked] = _nobody_said

    def select(self, rows: list[int]) -> Batch:
        """Some of the samples to generate, whose draws are the same by every name, and no real ones or pairs."""
        draws = Draws(self.draws.seed, self.draws.step, [self.draws.indices[row] for row in rows], self.draws.device)
        some = Batch(len(rows), self.shape, self.conditioning.select(rows), draws, None, self.logging)
        some.asked_for = lambda: _chosen(self.asked, rows)
        return some

    @property
    def asked(self) -> Asked:
        """The prompts or labels of the samples to generate, for who looks at pictures; None where there are none."""
        return self.asked_for()

    @property
    def real(self) -> Real:
        """B real samples with conditioning of their own.

        Raises:
            RuntimeError: the run has none, and the method should have said so before it began.
        """
        if self.given_real is None:
            raise RuntimeError("this run has no real samples")
        return self.given_real

    @property
    def pairs(self) -> Pairs:
        """B pairs with conditioning of their own.

        Raises:
            RuntimeError: the method asked for none.
        """
        if self.given_pairs is None:
            raise RuntimeError("this run has no pairs: a method asks for them when it is prepared")
        return self.given_pairs


def _chosen(asked: Asked, rows: Sequence[int]) -> Asked:
    if asked is None:
        return None
    chosen: list[Any] = [asked[row] for row in rows]
    return chosen


class Stream(Protocol):
    """What a run trains on."""

    @property
    def device(self) -> torch.device:
        """Of the batches."""
        ...

    def micro_batch(self, seed: int, step: int, indices: range, per_step: int, logging: bool) -> Batch:
        """One micro-batch of one process, see :class:`Batches`."""
        ...


@dataclass(frozen=True)
class Batches:
    """What a run trains on, in its keyed order: the same batches whatever the number of processes.

    Attributes:
        conditions: to generate for.
        shape: of one sample in the network's space.
        device: of the batches.
        real: real samples, None in a run without.
        pairs: of noise and sample, None where the method asked for none.
        announce: told the seed and the places of the real samples that this process will want in the next step.
        asked: what is generated at these places of the run's stream of conditions, given its seed.
    """

    conditions: Source[AnyConditioning]
    shape: tuple[int, ...]
    device: torch.device
    real: Source[Real] | None = None
    pairs: Source[Pairs] | None = None
    announce: Callable[[int, list[int]], None] | None = None
    asked: Callable[[int, Sequence[int]], Asked] | None = None

    def micro_batch(self, seed: int, step: int, indices: range, per_step: int, logging: bool) -> Batch:
        """One micro-batch of one process.

        Args:
            seed: of the run.
            step: of the run.
            indices: of its samples among those of the step.
            per_step: how many samples a step has, those of all micro-batches and processes.
            logging: whether the step is logged.
        """
        positions = [step * per_step + index for index in indices]
        batch = self.at(positions, Draws(seed, step, indices, self.device), per_step, logging)
        self.announce_at(seed, [position + per_step for position in positions])
        return batch

    def announce_at(self, seed: int, positions: Sequence[int]) -> None:
        """Tell that these places of the run's streams are wanted next."""
        if self.announce is not None:
            self.announce(seed, [*positions])

    def at(self, positions: Sequence[int], draws: Draws, per_step: int, logging: bool) -> Batch:
        """What lies at these places of the run's streams.

        Args:
            positions: B places.
            draws: of the B samples.
            per_step: as in :meth:`micro_batch`.
            logging: likewise.
        """
        seed = draws.seed
        return Batch(
            size=len(positions),
            shape=self.shape,
            conditioning=self.conditions.batch(seed, positions),
            draws=draws,
            given_real=self.real.batch(seed, positions) if self.real is not None else None,
            logging=logging,
            given_pairs=self.pairs.batch(seed, positions) if self.pairs is not None else None,
            per_step=per_step,
            asked_for=_nobody_said if self.asked is None else partial(self.asked, seed, positions),
        )


@dataclass(frozen=True)
class SizedBatches:
    """What a run trains on whose samples are of several sizes: in each step, on every process, those of one size.

    Over an epoch, of as many steps as there are items, each size has as many steps as it has items.

    Attributes:
        of: the batches of each size.
        counts: how many items each has.
        seed: of the run, by which the sizes take turns; that of its draws is another one after a roll-back, when pairs
            are there for these turns alone.
    """

    of: tuple[Batches, ...]
    counts: tuple[int, ...]
    seed: int

    @property
    def device(self) -> torch.device:
        """Of the batches."""
        return self.of[0].device

    def turn(self, step: int) -> tuple[int, int]:
        """The number of a step's size, and how many earlier steps had it."""
        return keyed_turn(self.seed, SIZES, self.counts, step)

    def micro_batch(self, seed: int, step: int, indices: range, per_step: int, logging: bool) -> Batch:
        """As :meth:`Batches.micro_batch`."""
        number, earlier = self.turn(step)
        positions = [earlier * per_step + index for index in indices]
        batch = self.of[number].at(positions, Draws(seed, step, indices, self.device), per_step, logging)
        number, earlier = self.turn(step + 1)
        self.of[number].announce_at(seed, [earlier * per_step + index for index in indices])
        return batch
