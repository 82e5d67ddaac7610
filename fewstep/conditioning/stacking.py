"""Many conditionings in few tensors: items of one structure and one shape are stacked, what they share is kept once.

A hundred thousand prompts have a handful of shapes. Stacked, each is a row of a few large tensors, which a safetensors
file gives out one by one; position ids and the like, equal for all, stand there only once. So does an item's picture,
which several answers of the network are told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.tree import decode, encode
from fewstep.reading import parse_json

_ANSWERS = "answers"


@dataclass(frozen=True)
class Group:
    """Items of one structure and shape.

    Attributes:
        kind: a digest of structure, shapes and dtypes: groups of one kind in two stacks may share a batch.
        tree: their structure, as :func:`fewstep.conditioning.tree.encode` gives it; tensors by name. Of items with
            further answers: ["answers", ...] with the structure of each, the item's own first.
        items: their places in the stack; the k-th is row k of the stacked tensors.
        stacked: the names of the tensors that have a row for each item; the others are the same for all.
    """

    kind: str
    tree: Any
    items: tuple[int, ...]
    stacked: frozenset[str]


class Stack:
    """Items by their place, each as it was stacked.

    Args:
        groups: what the tensors hold.
        tensor: gives a whole tensor by its name, ``<group>.<name in the tree>``.
        row: gives one row of a tensor by name and number.

    Raises:
        ValueError: the groups do not hold each place once.
    """

    def __init__(
        self, groups: Sequence[Group], tensor: Callable[[str], Tensor], row: Callable[[str, int], Tensor]
    ) -> None:
        self.groups, self._tensor, self._row = tuple(groups), tensor, row
        self._home = {place: (g, k) for g, group in enumerate(self.groups) for k, place in enumerate(group.items)}
        if sorted(self._home) != list(range(sum(len(group.items) for group in self.groups))):
            raise ValueError("the groups of a stack hold every place once")

    def __len__(self) -> int:
        return len(self._home)

    def __getitem__(self, place: int) -> Conditioning:
        """One item; its tensors are copies, so that they outlive a file."""
        number, row = self._home[place]
        group = self.groups[number]
        tensors: dict[str, Tensor] = {}
        for name in names_in(group.tree):
            full = f"{number}.{name}"
            value = self._row(full, row) if name in group.stacked else self._tensor(full)
            tensors[name] = value.clone()
        told, *others = (Conditioning(decode(tree, tensors), 1) for tree in _answers(group.tree))
        return Conditioning(told.tree, 1, others)


def stack(items: Sequence[Conditioning]) -> tuple[list[Group], dict[str, Tensor]]:
    """Stack items of one sample each: the groups, and the tensors that they name (on the CPU, contiguous).

    Raises:
        ValueError: an item holds several samples.
        TypeError: one holds what cannot be saved.
    """
    kinds: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
    for place, item in enumerate(items):
        if item.batch_size != 1:
            raise ValueError(f"items are stacked one by one, and item {place} holds {item.batch_size} samples")
        tensors: dict[str, Tensor] = {}
        tree = encode(item.tree, tensors)
        if item.others:
            tree = [_ANSWERS, tree, *(_encode_beside(other, tensors) for other in item.others)]
        shapes = [[str(tensor.dtype), list(tensor.shape)] for tensor in tensors.values()]
        kinds.setdefault(json.dumps([tree, shapes]), []).append((place, tensors))
    groups: list[Group] = []
    stacked: dict[str, Tensor] = {}
    for number, (kind, members) in enumerate(kinds.items()):
        first = members[0][1]
        differing = frozenset(
            leaf for leaf, value in first.items() if not all(torch.equal(value, t[leaf]) for _, t in members)
        )
        name = hashlib.sha256(kind.encode()).hexdigest()[:16]
        groups.append(Group(name, json.loads(kind)[0], tuple(place for place, _ in members), differing))
        for leaf, value in first.items():
            stacked[f"{number}.{leaf}"] = torch.stack([t[leaf] for _, t in members]) if leaf in differing else value
    return groups, stacked


def in_memory(items: Sequence[Conditioning]) -> Stack:
    """A stack whose tensors are held in this machine's memory (never a GPU's)."""
    groups, tensors = stack(items)
    return Stack(groups, tensors.__getitem__, lambda name, row: tensors[name][row])


def to_json(groups: Sequence[Group]) -> str:
    """Groups as JSON text."""
    return json.dumps([{**vars(group), "stacked": sorted(group.stacked)} for group in groups])


def from_json(text: str) -> list[Group]:
    """The groups that :func:`to_json` wrote.

    Raises:
        ValueError, TypeError, IndexError, KeyError, AttributeError: it did not.
    """
    groups = [Group(g["kind"], g["tree"], tuple(g["items"]), frozenset(g["stacked"])) for g in parse_json(text)]
    for group in groups:
        for tree in _answers(group.tree):
            decode(tree, dict.fromkeys(names_in(tree), torch.empty(0)))
    return groups


def one_of_each_kind(stacks: Iterable[Stack], size: int) -> list[int]:
    """The number of the first item of each kind in stacks that hold `size` items each (the last one what is left)."""
    first: dict[str, int] = {}
    for number, held in enumerate(stacks):
        for group in held.groups:
            first.setdefault(group.kind, number * size + group.items[0])
    return list(first.values())


def _answers(tree: Any) -> list[Any]:
    """The structure of each answer."""
    return list(tree[1:]) if tree[0] == _ANSWERS else [tree]


def _encode_beside(other: Conditioning, tensors: dict[str, Tensor]) -> Any:
    """The structure of a further answer; a tensor that is among ``tensors`` already is that one, others are added."""
    own: dict[str, Tensor] = {}
    tree, names = encode(other.tree, own), {}
    for name, value in own.items():
        same = (known for known, there in tensors.items() if there.dtype == value.dtype and torch.equal(there, value))
        names[name] = next(same, f"t{len(tensors)}")
        tensors[names[name]] = value
    return _renamed(tree, names)


def _renamed(tree: Any, names: dict[str, str]) -> Any:
    """An encoded tree with other names for its tensors."""
    if not isinstance(tree, list):
        return tree
    if len(tree) == 2 and tree[0] == "tensor" and isinstance(tree[1], str):
        return ["tensor", names[tree[1]]]
    return [_renamed(child, names) for child in tree]


def names_in(tree: Any) -> Iterator[str]:
    """The names of the tensors in an encoded tree."""
    if isinstance(tree, list):
        if len(tree) == 2 and tree[0] == "tensor" and isinstance(tree[1], str):
            yield tree[1]
        else:
            for child in tree:
                yield from names_in(child)
