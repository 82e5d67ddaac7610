"""Samples that cannot form one batch: groups of equal shape, each called by itself, the answers put in order again.

Some pipelines make the text as long as the prompt and pass no mask. Padding would then change what the network says of
a prompt, so prompts of several lengths share a step of training, and not a call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.sending import known_too, sent

#: The places (in 0..B-1) of a group's samples in the batch, and their conditioning.
Group = tuple[tuple[int, ...], Conditioning]


class RaggedConditioning:
    """The conditioning of B samples in groups; in the place of a :class:`Conditioning` wherever samples are denoised.

    Args:
        groups: together their places are 0..B-1.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        places = [place for rows, _ in self.groups for place in rows]
        self.batch_size = len(places)
        if sorted(places) != list(range(self.batch_size)) or any(len(r) != c.batch_size for r, c in self.groups):
            raise ValueError(f"the groups of a ragged conditioning hold every place once, not {places}")
        self._order = [places.index(place) for place in range(self.batch_size)]

    def __repr__(self) -> str:
        return f"RaggedConditioning({', '.join(repr(part) for _, part in self.groups)})"

    def select(self, index: Tensor | Sequence[int]) -> Conditioning | RaggedConditioning:
        """The samples of `index` (B',), as :meth:`Conditioning.select`; one plain batch where their shapes agree."""
        home = {row: (part, k) for rows, part in self.groups for k, row in enumerate(rows)}
        positions = [int(i) for i in (index.tolist() if isinstance(index, Tensor) else index)]
        if not positions or not set(positions) <= home.keys():
            raise IndexError(f"select wants indices in 0..{self.batch_size - 1}, at least one; got {positions}")
        return join([part.select([k]) for part, k in (home[position] for position in positions)])

    @property
    def others(self) -> tuple[Conditioning | RaggedConditioning, ...]:
        """What the network is told for the further answers of the B samples, see :class:`Conditioning`."""
        home = {row: (part, k) for rows, part in self.groups for k, row in enumerate(rows)}
        parts = [home[row] for row in range(self.batch_size)]
        return tuple(
            join([part.others[number].select([k]) for part, k in parts]) for number in range(len(parts[0][0].others))
        )

    def alone(self) -> RaggedConditioning:
        """As :meth:`Conditioning.alone`."""
        return RaggedConditioning([(rows, part.alone()) for rows, part in self.groups])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> RaggedConditioning:
        """As :meth:`Conditioning.to`."""
        return RaggedConditioning([(rows, part.to(device, dtype)) for rows, part in self.groups])

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> RaggedConditioning:
        """As :meth:`Conditioning.map_tensors`."""
        return RaggedConditioning([(rows, part.map_tensors(change)) for rows, part in self.groups])

    def in_order(self, answers: Sequence[Tensor]) -> Tensor:
        """The groups' answers (n, ...) as one tensor (B, ...), each sample at its place."""
        return _rows(torch.cat(list(answers)), self._order)


#: What a denoiser is told of B samples.
AnyConditioning = Conditioning | RaggedConditioning


def join(items: Sequence[AnyConditioning]) -> AnyConditioning:
    """All samples of `items`, in order: one batch where they can form one, groups of equal shape elsewhere.

    The groups stand in the order of their first samples, so the result depends on the items alone.
    """
    found: list[tuple[list[int], list[Conditioning]]] = []
    done = 0
    for item in items:
        for rows, part in _groups(item):
            home = next((group for group in found if Conditioning.compatible(group[1][0], part)), None)
            if home is None:
                home = ([], [])
                found.append(home)
            home[0].extend(row + done for row in rows)
            home[1].append(part)
        done += item.batch_size
    if len(found) == 1 and found[0][0] == list(range(done)):
        return Conditioning.cat(found[0][1])
    return RaggedConditioning([(tuple(rows), Conditioning.cat(parts)) for rows, parts in found])


def with_others(conditioning: AnyConditioning, others: Sequence[AnyConditioning]) -> AnyConditioning:
    """The same B samples with other further answers, of B samples each: the ways in which guidance leads away.

    Raises:
        ValueError: they are of another number of samples.
    """
    if any(other.batch_size != conditioning.batch_size for other in others):
        raise ValueError(f"further answers of {[other.batch_size for other in others]} samples; select() expands them")
    told, own = conditioning.alone(), [other.alone() for other in others]
    if isinstance(told, Conditioning) and all(isinstance(other, Conditioning) for other in own):
        return Conditioning(told.tree, told.batch_size, own)  # type: ignore[arg-type]  # as was just seen
    rows = range(told.batch_size)
    return join([with_others(told.select([row]), [other.select([row]) for other in own]) for row in rows])


def without_condition(conditioning: AnyConditioning, rows: Sequence[bool]) -> AnyConditioning:
    """The conditioning of B samples, in which their own last further answer stands wherever ``rows`` (B) is true.

    Raises:
        ValueError: they have no further answers.
    """
    if not any(rows):
        return conditioning
    if not conditioning.others:
        raise ValueError("samples without further answers cannot lose their condition")
    told, nothing = conditioning.alone(), conditioning.others[-1]
    mixed = join([(nothing if row else told).select([place]) for place, row in enumerate(rows)])
    return with_others(mixed, conditioning.others)


def in_groups(
    call: Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor],
    x_t: Tensor,
    t: Tensor,
    conditioning: AnyConditioning,
    end: Tensor | None = None,
) -> Tensor:
    """`call(x_t, t, conditioning, end)`, once for each group where the conditioning is ragged; gradients pass through.

    Args:
        call: answers one batch of samples of equal shape with a tensor (n, ...).
        x_t: (B, ...).
        t: (B,).
        conditioning: of B samples.
        end: (B,), or None.

    Raises:
        ValueError: the conditioning is ragged, and of another number of samples.
    """
    if not isinstance(conditioning, RaggedConditioning):
        return call(x_t, t, conditioning, end)
    if len(x_t) != conditioning.batch_size:
        raise ValueError(f"conditioning for {conditioning.batch_size} samples, x for {len(x_t)}; select() expands it")
    return conditioning.in_order(
        [
            call(
                _rows(x_t, rows),
                known_too(partial(_rows, rows=rows), t),
                part,
                None if end is None else _rows(end, rows),
            )
            for rows, part in conditioning.groups
        ]
    )


def _groups(item: AnyConditioning) -> Sequence[Group]:
    return item.groups if isinstance(item, RaggedConditioning) else [(tuple(range(item.batch_size)), item)]


def _rows(value: Tensor, rows: Sequence[int]) -> Tensor:
    return value.index_select(0, sent(rows, value.device, torch.int64))
