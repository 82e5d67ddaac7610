"""The pairs of a run in its keyed order, and which of all pairs that order asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.config.pairs import PairsWanted
from fewstep.data.batch import SIZES, Pairs
from fewstep.data.conditions import Conditions
from fewstep.data.pairs import StoredPairs, items_of_pairs
from fewstep.diffusion.draws import keyed_generator, keyed_order, keyed_turn
from fewstep.errors import UserError

_STREAM, _INVERTED_STREAM = "pairs", "inverted pairs"


class PairStream:
    """The pairs of a run, in a keyed order: a :class:`fewstep.data.batch.Source`.

    Args:
        pairs: made from noise.
        conditions: the run's.
        device: where batches are put.
        inverted: real samples with the noise that the ODE leads them to.
        share: of the samples that are drawn from ``inverted``.
    """

    def __init__(
        self,
        pairs: StoredPairs,
        conditions: Conditions,
        device: torch.device | str,
        inverted: StoredPairs | None = None,
        share: float = 0.0,
    ) -> None:
        self.pairs, self.conditions, self.device, self.share = pairs, conditions, device, share
        self.inverted = inverted if inverted is not None and inverted.numbers else None
        self._among: Sequence[int] = range(len(pairs))
        self._held = pairs.numbers
        self._places: dict[int, int] = {}

    def only(self, rows: Sequence[int], part: Conditions) -> PairStream:
        """The pairs for some of the conditions, which are ``part`` by themselves.

        Raises:
            UserError: there are none.
        """
        some = PairStream(self.pairs, part, self.device)
        some._places = {row: place for place, row in enumerate(rows)}
        items = items_of_pairs(self.conditions, self.pairs.about["seed"], range(len(self.pairs)))
        some._among = [number for number, item in enumerate(items) if item in some._places]
        some._held = [number for number in self.pairs.numbers if items[number] in some._places]
        if not some._among:
            raise _none_for(len(self.pairs), len(rows))
        return some

    def batch(self, seed: int, positions: Sequence[int]) -> Pairs:
        """The pairs at these places of the run's endless stream."""
        rows = [self._row(seed, position) for position in positions]
        x0 = torch.stack([x0 for x0, _, _ in rows]).to(self.device, non_blocking=True)
        noise = torch.stack([noise for _, noise, _ in rows]).to(self.device, non_blocking=True)
        places = [self._places.get(item, item) for _, _, item in rows]
        return Pairs(x0, noise, self.conditions.select(places))

    def _row(self, seed: int, position: int) -> tuple[Tensor, Tensor, int]:
        store, name, among, held = self.pairs, _STREAM, self._among, self._held
        if self.inverted is not None and (not held or _is_inverted(seed, position, self.share)):
            store, name = self.inverted, _INVERTED_STREAM
            among, held = range(len(store)), store.numbers
        number = among[keyed_order(seed, name, len(among), position)]
        if number not in store:
            # A short run has the pairs of its own order alone, and after a roll-back takes these in another one.
            number = held[keyed_order(seed, f"{name} of a roll-back", len(held), position)]
        return store.row(number)


def numbers_used(wanted: PairsWanted, num: int, seed: int, positions: int, *, inverted: bool) -> list[int]:
    """The pairs that a :class:`PairStream` asks for at its first places, each once, in the order of their first use.

    Args:
        wanted: by the run.
        num: how many pairs the stream goes through.
        seed: of the run.
        positions: how many places of the stream the run uses.
        inverted: those of real samples are meant.
    """
    name = _INVERTED_STREAM if inverted else _STREAM
    used: dict[int, None] = {}
    for position in range(positions):
        if len(used) == num:
            break
        if not wanted.of_real or _is_inverted(seed, position, wanted.inverted_share) == inverted:
            used[keyed_order(seed, name, num, position)] = None
    return list(used)


def sized_numbers_used(conditions: Conditions, num: int, seed: int, steps: int, per_step: int) -> list[int]:
    """As :func:`numbers_used`, of a run whose samples are of several sizes, one in each step.

    Args:
        conditions: of the run.
        num: how many pairs it goes through.
        seed: of the run, and of the pairs.
        steps: that it makes.
        per_step: how many pairs a step has.

    Raises:
        UserError: so few pairs are none for some size.
    """
    sizes = conditions.sizes()
    size_of = {row: number for number, (_, rows) in enumerate(sizes) for row in rows}
    among: list[list[int]] = [[] for _ in sizes]
    for pair, item in enumerate(items_of_pairs(conditions, seed, range(num))):
        among[size_of[item]].append(pair)
    for (_, rows), pairs in zip(sizes, among, strict=True):
        if not pairs:
            raise _none_for(num, len(rows))
    used: dict[int, None] = {}
    for step in range(steps):
        if len(used) == num:
            break
        size, earlier = keyed_turn(seed, SIZES, [len(rows) for _, rows in sizes], step)
        for position in range(earlier * per_step, (earlier + 1) * per_step):
            used[among[size][keyed_order(seed, _STREAM, len(among[size]), position)]] = None
    return list(used)


def _none_for(num: int, items: int) -> UserError:
    return UserError(f"of {num:,} pairs none is for the {items:,} items of one of the sizes; make more")


def _is_inverted(seed: int, position: int, share: float) -> bool:
    """Whether a place of a mixed stream has a pair of a real sample."""
    return float(torch.rand((), generator=keyed_generator(seed, "inverted", position))) < share
