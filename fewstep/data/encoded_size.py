"""What items will take once they are encoded: some of them are, from the smallest form to the largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Form, Item, Size
from fewstep.config.values import bytes_in_words
from fewstep.data.encoding import encode_one, tensors_of
from fewstep.data.items import differing
from fewstep.recording import Recording

_FORMS = 8  # of items, of which some are encoded
_COMPARED = 100  # items of a form, among which one is looked for that is unlike the first


@dataclass(frozen=True)
class Examples:
    """One item each of some forms, encoded, from those of the fewest pixels to those of the most.

    Attributes:
        each: the items.
        told: what the network is told of each.
        own: bytes of one draw of all items beside `shared`, those of other forms taken to be as the nearest in pixels.
        shared: bytes that are alike in all items of a form, and kept once.
        forms: how many all items have.
        count: of all items.
    """

    each: list[Item]
    told: list[Conditioning]
    own: int
    shared: int
    forms: int
    count: int

    @property
    def mean(self) -> float:
        """Bytes of one draw of an item, beside what it shares."""
        return self.own / self.count

    def total(self, draws: int) -> int:
        """Bytes of so many draws of all items, as a cache holds them."""
        return draws * self.own + self.shared

    def describe(self, draws: int) -> str:
        """The same in words."""
        times = f" in {draws} draws" if draws > 1 else ""
        forms = f" in {self.forms:,} forms" if self.forms > 1 else ""
        total, mean = bytes_in_words(self.total(draws)), bytes_in_words(draws * self.mean)
        return f"{self.count:,} items{forms}{times} take about {total} once they are encoded, {mean} each"


def examples_of(recording: Recording, items: Sequence[Item]) -> Examples:
    """Encode one item of each form, of many forms the first and the last in pixels and others spread between them.

    A second item of a form shows what all of them share, such as an empty negative prompt.
    """
    members: dict[Form, list[Item]] = {}
    for item in items:
        members.setdefault(item.form, []).append(item)
    forms = sorted(members, key=_pixels)
    last = min(_FORMS, len(forms)) - 1
    some = [forms[round(place * (len(forms) - 1) / last) if last else 0] for place in range(last + 1)]
    told: list[Conditioning] = []
    own: dict[Form, int] = {}
    shared: dict[Form, int] = {}
    for form in some:
        first, *rest = members[form][:_COMPARED]
        told.append(encode_one(recording, first))
        tensors = _distinct(told[-1])
        other = max(rest, key=lambda one: differing(first, one), default=None)
        unlike = [] if other is None else _distinct(encode_one(recording, other))
        shared[form] = sum(tensor.nbytes for tensor in tensors if _among(tensor, unlike))
        own[form] = sum(tensor.nbytes for tensor in tensors) - shared[form]
    near = {form: min(some, key=lambda known: abs(_pixels(known) - _pixels(form))) for form in forms}
    return Examples(
        [members[form][0] for form in some],
        told,
        sum(len(members[form]) * own[near[form]] for form in forms),
        sum(shared[near[form]] for form in forms),
        len(forms),
        len(items),
    )


def _distinct(told: Conditioning) -> list[Tensor]:
    """All tensors, each once, though several answers are told it."""
    kept: list[Tensor] = []
    for tensor in tensors_of(told):
        if not _among(tensor, kept):
            kept.append(tensor)
    return kept


def _among(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor.dtype == other.dtype and torch.equal(tensor, other) for other in others)


def _pixels(form: Form) -> int:
    """Of all pictures in an item of a form."""

    def counted(value: object) -> int:
        if isinstance(value, Size):
            return value.width * value.height
        return sum(map(counted, value)) if isinstance(value, tuple) else 0

    return counted(form)
