"""What a run generates for: prompts, class labels or items, encoded once or read from a cache, in a keyed order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Item
from fewstep.conditioning.ragged import AnyConditioning, RaggedConditioning, join, with_others
from fewstep.conditioning.stacking import Stack, in_memory, one_of_each_kind
from fewstep.config.values import shown
from fewstep.data.batch import Asked
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.encoding import CutPrompts, encode_each, encoding_bar
from fewstep.data.image_shards import find_shards
from fewstep.data.images import read_images
from fewstep.data.padding import Padding, find_padding
from fewstep.diffusion.draws import keyed_generator, keyed_order
from fewstep.errors import UserError
from fewstep.recording import Recording

_MOST_CLASSES = 10**6  # a longer range is a slip of the keyboard, and its list would fill the memory
_MOST_DIGITS = 18  # of a label
_LOOKED_AT = 64  # items, each of a shape of its own, that decide whether padding serves
_STACKED = 1000  # items that are encoded before they are stacked


def read_prompts(path: str | Path, text: str | None = None, index: Path | None = None) -> list[str]:
    """The non-empty lines of a UTF-8 file, which end at a newline alone; or the texts of a set of images, each once.

    Args:
        path: of the file, or of the images as ``--data`` takes them.
        text: which column, field or suffix has the images' texts; None: what is there.
        index: folder in which it is kept what shards hold.

    Raises:
        UserError: the file is missing, not UTF-8, or holds no prompt.
    """
    if Path(path).is_dir() or find_shards(str(path)):
        images = read_images(str(path), text, index)
        texts = images.texts
        if texts is None:
            raise UserError(f"--prompts {path} has images without texts")
        return [one for one in dict.fromkeys(texts) if one]
    try:
        # Neither splitlines nor text mode: a prompt may hold the other characters that they take for the end of a line.
        lines = [line.strip() for line in Path(path).read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise UserError(f"cannot read --prompts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8 text") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt; write one on each line")
    return prompts


def read_classes(text: str) -> list[int]:
    """Labels from ``0-9`` or ``1,5,7-8``.

    Raises:
        UserError: it is neither.
    """
    labels: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        numbers = low.isdecimal() and (high.isdecimal() or not dash) and max(len(low), len(high)) <= _MOST_DIGITS
        if not numbers or int(high or low) < int(low):
            raise UserError(f"--classes takes labels such as 0-9 or 1,5,7, not {shown(text)}")
        if len(labels) + int(high or low) - int(low) >= _MOST_CLASSES:
            raise UserError(f"--classes {shown(text)} are more than {_MOST_CLASSES:,} labels")
        labels += range(int(low), int(high or low) + 1)
    return labels


def asked_items(
    recording: Recording,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | None,
    items: Sequence[Item] | None = None,
) -> list[Any] | None:
    """The prompts, labels or items, of the kind that the teacher takes; None for an unconditional teacher.

    Raises:
        UserError: the teacher asks for conditions of the other kind, or for any at all, or does not know a label.
    """
    kind = recording.conditional
    told = {"prompt": prompts, "item": items, "label": labels}
    refuse_other_kind(kind, next((name for name, given in told.items() if given is not None), None))
    if prompts is not None or items is not None:
        return [*(prompts or items or ())]
    if labels is None:
        return None
    # Beyond its table a network stops in the middle of a run, on a GPU with the whole process.
    count = recording.label_count()
    if beyond := [label for label in labels if label < 0 or (count is not None and label >= count)]:
        known = "at least 0" if count is None else f"in 0..{count - 1}"
        raise UserError(f"this teacher's class labels are {known}, and {beyond[0]} is not")
    return list(labels)


def refuse_other_kind(kind: str | None, given: str | None) -> None:
    """Raises :class:`UserError` where conditions of another kind are given than a teacher takes."""
    if kind != given:
        wanted = {"prompt": "--prompts FILE", "label": "--classes 0-9", None: "neither --prompts nor --classes"}
        wanted["item"] = "--items FILE, a prompt with its pictures in each row"
        raise UserError(f"this teacher is conditioned on {kind or 'nothing'}: it takes {wanted[kind]}")


class Conditions:
    """The conditions of a run, and the keyed order in which they are used.

    They are encoded once, each alone, as users sample, and kept in this machine's memory; or they stay on the disk, in
    a cache, and each batch reads what it needs. Items of several shapes are padded where the network has a mask and
    padding is proven harmless, and form a ragged batch elsewhere: each sample is conditioned as if it were alone.

    With each sample goes what guidance leads away from: of prompts and labels the teacher's one negative.

    Args:
        recording: of the teacher.
        prompts: for a text-conditioned teacher.
        labels: for a class-conditional one.
        device: where batches are put.
        items: for one that looks at pictures.
        cache: of this teacher, in the place of prompts and labels; with items, of these.
        progress: show how far encoding is.
        draws: how many are kept of what the pipeline draws for each item, where it draws anything; those of a cache are
            its own.

    Raises:
        UserError: the teacher asks for conditions of the other kind, or for any at all, or does not know a label; or
            the cache has another number of draws than are asked for.
    """

    def __init__(
        self,
        recording: Recording,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        *,
        items: Sequence[Item] | None = None,
        cache: ConditionCache | None = None,
        progress: bool = False,
        draws: int = 1,
    ) -> None:
        kept = draws_of(recording, draws)
        self.draws = kept if cache is None else cache.draws
        if cache is not None and kept not in (1, cache.draws):
            raise UserError(f"--draws {draws}: the cache {cache.folder} holds {cache.draws} of each item; make another")
        self.draws_note = nothing_drawn(draws, kept)
        self.kind = recording.conditional
        self._device = device
        self._items: list[Any] | None = None if items is None else list(items)
        self._rows: dict[Any, int] | None = None
        self._cache = cache
        self._stacks: list[Stack] = []
        self._chosen: Sequence[int] | None = None
        self.cut_note = ""
        if cache is not None:
            refuse_other_kind(self.kind, cache.kind)
            self.count, kinds = len(cache), cache.kinds()
        elif (asked := asked_items(recording, prompts, labels, items)) is not None:
            self._items = asked
            cut = CutPrompts()
            with encoding_bar(recording, len(asked), disable=not progress) as bar:
                for first in range(0, len(asked), _STACKED):
                    encoded = encode_each(recording, asked[first : first + _STACKED], cut, bar, self.draws)
                    self._stacks.append(in_memory(list(encoded)))
            self.cut_note = cut.note(len(asked))
            found = one_of_each_kind(self._stacks, _STACKED * self.draws)
            self.count, kinds = len(asked), list(dict.fromkeys(number // self.draws for number in found))
        else:
            self._unconditional = recording.condition().to("cpu")
            self.count, kinds = 1, []
        negative = recording.negative() if cache is None else cache.negative()
        self._negative = None if negative is None else negative.to(device=device)
        self._main = recording.sample_shape
        self._shapes: list[tuple[int, ...]] | None = None
        if recording.sizes and items is not None:
            self._shapes = [recording.for_item(item).sample_shape for item in items]
        self.padding: Padding | None = None
        self.note = ""
        #: Whether a batch may take several calls of the network.
        self.grouped = False
        if len(kinds) > 1:
            some = {self.items()[row]: self._item(row) for row in kinds[:: -(-len(kinds) // _LOOKED_AT)]}
            # Items of several forms differ in more than a text's length.
            self.padding = None if self.kind == "item" else find_padding(recording, some)
            if self.padding is not None:
                self.note = f"{self.kind}s of several lengths are padded; the mask was proven to hide that"
            elif isinstance(join(list(some.values())), RaggedConditioning):
                self.grouped = True
                what = "forms" if self.kind == "item" else "lengths"
                self.note = f"{self.kind}s of several {what}: each batch is called in groups of equal {what[:-1]}"
        if len(sizes := self.sizes()) > 1:
            listed = ", ".join(f"{len(rows):,} of {list(shape)}" for shape, rows in sizes)
            self.note = f"items whose samples are of {len(sizes)} sizes ({listed}): each step has those of one"

    def __len__(self) -> int:
        return self.count

    @property
    def notes(self) -> list[str]:
        """What a user may want to know of them, a line each."""
        return [line for line in (self.cut_note, self.draws_note, self.note) if line]

    def items(self) -> list[Any]:
        """The prompts, labels or items in order; none for an unconditional teacher."""
        if self._items is None:
            self._items = self._cache.items() if self._cache is not None else []
        return self._items

    def shape(self, row: int) -> tuple[int, ...]:
        """Of a sample of this item, in the network's space."""
        return self._main if self._shapes is None else self._shapes[row]

    def sizes(self) -> list[tuple[tuple[int, ...], Sequence[int]]]:
        """The shapes that samples have, in the order of their first items, each with the numbers of its items."""
        if self._shapes is None:
            return [(self._main, range(len(self)))]
        found: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(self._shapes):
            found.setdefault(shape, []).append(row)
        return list(found.items())

    def of_one_size(self) -> Conditions:
        """Those items alone whose samples have the shape of the first one's; all where all have."""
        _, rows = self.sizes()[0]
        return self.only(rows) if len(rows) < len(self) else self

    def rows(self, items: Sequence[Any]) -> list[int] | None:
        """The numbers of these prompts, labels or items among the conditions; None where one of them is not there."""
        if self._rows is None:
            self._rows = {item: row for row, item in reversed(list(enumerate(self.items())))}
        known = self._rows
        return [known[item] for item in items] if all(item in known for item in items) else None

    def only(self, rows: Sequence[int]) -> Conditions:
        """These items alone, encoded and padded as they are among all."""
        some = copy.copy(self)
        some._items, some._rows, some.count = [self.items()[row] for row in rows], None, len(rows)
        some._chosen = [row if self._chosen is None else self._chosen[row] for row in rows]
        some._shapes = None if self._shapes is None else [self._shapes[row] for row in rows]
        return some

    def one(self, row: int) -> Conditioning:
        """The conditioning of one item, on the CPU and as it was encoded."""
        return self._item(row)

    @property
    def further(self) -> int:
        """How many further answers each item has: 0 without classifier-free guidance."""
        return len(self._item(0).others) if self.kind == "item" else 0 if self._negative is None else 1

    def select(self, rows: Sequence[int], draws: Sequence[int] | None = None) -> AnyConditioning:
        """The conditioning of these items with their further answers, on the device; by default their first draws."""
        items = [self._item(row, draw) for row, draw in zip(rows, draws or [0] * len(rows), strict=True)]
        told = join(self.padding.padded(items) if self.padding is not None else items).to(device=self._device)
        return told if self.kind == "item" else with_others(told, self.others(rows))

    def others(self, rows: Sequence[int]) -> tuple[AnyConditioning, ...]:
        """What the network is told for the further answers of these items, on the device."""
        if self.kind == "item":
            return self.select(rows).others
        return () if self._negative is None else (self._negative.select([0] * len(rows)),)

    def batch(self, seed: int, positions: Sequence[int], stream: str = "conditions") -> AnyConditioning:
        """The conditioning at these places of the run's endless, keyed stream."""
        rows = [keyed_order(seed, stream, len(self), position) for position in positions]
        return self.select(rows, self.drawn(seed, stream, positions))

    def drawn(self, seed: int, stream: str, positions: Sequence[int]) -> list[int] | None:
        """Which of an item's draws is taken at these places of a stream; None where each has one."""
        if self.draws == 1:
            return None
        keys = [keyed_generator(seed, "draws", stream, position) for position in positions]
        return [int(torch.randint(self.draws, (), generator=key)) for key in keys]

    def asked(self, seed: int, positions: Sequence[int]) -> Asked:
        """The prompts or labels at these places of the same stream, of items the prompts; None where there are none."""
        items = self.texts()
        return [items[keyed_order(seed, "conditions", len(self), place)] for place in positions] if items else None

    def texts(self) -> list[Any]:
        """The prompts or labels in order, of items their prompts; none where there are none."""
        items = self.items()
        if self.kind != "item":
            return items
        return [item.subject for item in items] if items and items[0].subject is not None else []

    def _item(self, row: int, draw: int = 0) -> Conditioning:
        row = row if self._chosen is None else self._chosen[row]
        if self._cache is not None:
            return self._cache.draw(row, draw)
        number, place = divmod(row * self.draws + draw, _STACKED * self.draws)
        return self._stacks[number][place] if self._stacks else self._unconditional


def draws_of(recording: Recording, draws: int) -> int:
    """How many draws of an item are kept where so many are asked for: one of a teacher that draws nothing for it.

    Raises:
        UserError: the teacher has no items.
    """
    if draws > 1 and recording.conditional != "item":
        raise UserError(f"--draws {draws} is of what a teacher draws for its pictures, and this one is told none")
    return draws if recording.told is not None and recording.told.draws else 1


def nothing_drawn(draws: int, kept: int) -> str:
    """One line for people where more draws are asked for than are kept, else ""."""
    return f"--draws {draws}: this teacher draws nothing for its items, so each has one" if kept < draws else ""
