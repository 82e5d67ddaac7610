"""What a pipeline makes of an item's sample outside of its network, kept beside what the network is told.

*Pinned* entries of a sample are replaced between two steps, by the item's picture as it is or under the walk's first
noise: whatever a network says there, they are clean what the picture is. The *tail* are the entries of the decoder's
input that come from the item, and not from the sample. Both are leaves of the item's own tree, so that they are
selected, joined, moved and cached with it; no network is told them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, RaggedConditioning
from fewstep.conditioning.tree import Leaf

#: The name of their part of a tree, which no argument of a network can have.
OUTSIDE = "outside of the network"
_WHERE, _VALUE, _TAIL = "pinned", "picture", "tail"


class Pins(NamedTuple):
    """Entries of B samples that their pipeline pins: ``where`` (bool) they are, and ``value``, clean; (B, ...) each."""

    where: Tensor
    value: Tensor


def with_outside(told: Conditioning, pins: Pins | None, tail: Tensor | None) -> Conditioning:
    """What B samples are told, with their pins and their tail (B, n); one of them has to be there."""
    leaves = {} if pins is None else {_WHERE: Leaf(pins.where, 1), _VALUE: Leaf(pins.value, 1)}
    leaves |= {} if tail is None else {_TAIL: Leaf(tail, 1)}
    return Conditioning({**told.tree, OUTSIDE: leaves}, told.batch_size, told.others)


def as_beside(told: Conditioning, other: Conditioning) -> Conditioning:
    """A further answer of the samples of ``told``, pinned as they are: guidance leads away from a pin by nothing."""
    if OUTSIDE not in told.tree:
        return other
    return Conditioning({**other.tree, OUTSIDE: told.tree[OUTSIDE]}, other.batch_size)


def pins_of(conditioning: AnyConditioning) -> Pins | None:
    """The pins of B samples; None where nothing is pinned."""
    where, value = _leaf(conditioning, _WHERE), _leaf(conditioning, _VALUE)
    return None if where is None or value is None else Pins(where, value)


def tail_of(conditioning: AnyConditioning) -> Tensor | None:
    """Of B samples the entries of the decoder's input that are their items' own: (B, n), or None."""
    return _leaf(conditioning, _TAIL)


def _leaf(conditioning: AnyConditioning, name: str) -> Tensor | None:
    if isinstance(conditioning, RaggedConditioning):
        parts = [_leaf(part, name) for _, part in conditioning.groups]
        tensors = [part for part in parts if part is not None]
        return conditioning.in_order(tensors) if tensors else None
    leaf = conditioning.tree.get(OUTSIDE, {}).get(name)
    return None if leaf is None else leaf.value
