"""What a network is told besides the sample and the time: one tree per prompt or label.

A network's keyword arguments form a tree (dicts, lists, tuples) with leaves of three kinds:

- *per sample*: a tensor whose leading axis holds `rows` rows in a row for each sample. `rows` is 1 for a text embedding
  and the number of frames where a video pipeline repeats the text once per frame.
- *a list with entries per sample*: `rows` consecutive entries for each sample (ragged embeddings, image shapes).
- *shared*: position ids, rotary tables, plain numbers, None. Never indexed, and equal for all samples of one batch.

Classifier-free guidance combines several answers of the network to one sample. What it is told for the further ones
(the negative prompt, with the sample's own picture) goes with the sample: selected, joined and moved along with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.conditioning.shared import moved
from fewstep.conditioning.tree import (
    Leaf,
    SampleList,
    brief,
    decode,
    describe,
    encode,
    joinable,
    leaves,
    length_of,
    map_leaves,
    map_paths,
    map_plain,
    plain,
)
from fewstep.sending import sent

FORMAT = "fewstep-conditioning-1"


class Conditioning:
    """The keyword arguments of a network other than sample and time, for `batch_size` samples.

    Args:
        tree: argument name -> node, where a node is a dict, list or tuple of nodes, a `Leaf` or a `SampleList`.
        batch_size: the number of samples B. A network without any conditioning still has one.
        others: what the network is told for the further answers of the same samples, in the order in which guidance
            leads away from them; () where there is no classifier-free guidance. They have none themselves.
    """

    def __init__(self, tree: dict[str, Any], batch_size: int, others: Sequence[Conditioning] = ()) -> None:
        if batch_size < 1:
            raise ValueError(f"a Conditioning holds at least one sample, not {batch_size}")
        for path, node in leaves(tree):
            length = length_of(node)
            if length is not None and length != node.rows * batch_size:
                raise ValueError(
                    f"the conditioning argument {path} has {length} rows for {batch_size} samples of {node.rows} each"
                )
        for number, other in enumerate(others, start=1):
            if other.batch_size != batch_size or other.others:
                raise ValueError(
                    f"the further answer {number} is of {other.batch_size} samples with {len(other.others)} answers of "
                    f"their own, beside {batch_size} samples; it has to be of as many, with none"
                )
        self.tree = tree
        self.others: tuple[Conditioning, ...] = tuple(others)
        self._batch_size = batch_size

    def __repr__(self) -> str:
        others = f", and {len(self.others)} more" * bool(self.others)
        return f"Conditioning(batch_size={self.batch_size}, {', '.join(self.describe())}{others})"

    @property
    def batch_size(self) -> int:
        """The number of samples B."""
        return self._batch_size

    def describe(self) -> list[str]:
        """One text per leaf: its path, what it holds, and how it depends on the batch."""
        return [f"{path}: {describe(node)}" for path, node in leaves(self.tree)]

    def alone(self) -> Conditioning:
        """The same samples without their further answers."""
        return Conditioning(self.tree, self.batch_size) if self.others else self

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments to pass to the network (fresh containers, the tensors themselves)."""
        return plain(self.tree)

    def select(self, index: Tensor | Sequence[int]) -> Conditioning:
        """The samples of `index` (B',), in that order, repeats allowed: `select([0] * B)` expands a batch of one.

        Raises:
            IndexError: an index lies outside 0..B-1, or none is given.
        """
        positions = [int(i) for i in (index.tolist() if isinstance(index, Tensor) else index)]
        if not positions or min(positions) < 0 or max(positions) >= self.batch_size:
            raise IndexError(f"select wants indices in 0..{self.batch_size - 1}, at least one; got {positions}")

        def pick(node: Leaf | SampleList) -> Leaf | SampleList:
            if node.rows == 0:
                return node
            rows = [p * node.rows + r for p in positions for r in range(node.rows)]
            if isinstance(node, SampleList):
                return SampleList(tuple(node.items[r] for r in rows), node.rows, node.is_tuple)
            return Leaf(node.value.index_select(0, sent(rows, node.value.device, torch.int64)), node.rows)

        others = [other.select(positions) for other in self.others]
        return Conditioning(map_leaves(self.tree, pick), len(positions), others)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor to `device`; cast the real floating-point ones to `dtype`."""

        # Towards a GPU the host need not wait; on the way back it has to.
        ahead = device is not None and torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None, non_blocking=ahead)

        def apply(node: Leaf | SampleList) -> Leaf | SampleList:
            if isinstance(node, Leaf) and node.rows == 0 and isinstance(node.value, Tensor):
                return Leaf(moved(node.value, device, dtype))
            return _changed(node, move)

        others = [other.to(device, dtype) for other in self.others]
        return Conditioning(map_leaves(self.tree, apply), self.batch_size, others)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Replace every tensor by `change(tensor)`, which must keep its leading axis."""
        others = [other.map_tensors(change) for other in self.others]
        return Conditioning(map_leaves(self.tree, lambda node: _changed(node, change)), self.batch_size, others)

    @staticmethod
    def mismatch(a: Conditioning, b: Conditioning) -> str | None:
        """Why `a` and `b` cannot form one batch (one phrase), or None when they can."""
        left, right = dict(leaves(a.tree)), dict(leaves(b.tree))
        if left.keys() != right.keys():
            return f"only one of them has {', '.join(sorted(left.keys() ^ right.keys()))}"
        for path, one in left.items():
            other = right[path]
            if isinstance(one, SampleList) and isinstance(other, SampleList) and one.rows == other.rows:
                continue  # lists exist because their entries may be ragged
            if isinstance(one, Leaf) and isinstance(other, Leaf) and one.rows == other.rows and joinable(one, other):
                continue
            return f"{path} is {describe(one)} in one and {describe(other)} in the other"
        if len(a.others) != len(b.others):
            return f"one has {len(a.others)} further answers and the other {len(b.others)}"
        for number, (mine, theirs) in enumerate(zip(a.others, b.others, strict=True), start=1):
            reason = Conditioning.mismatch(mine, theirs)
            if reason is not None:
                return f"for the further answer {number} {reason}"
        return None

    @staticmethod
    def compatible(a: Conditioning, b: Conditioning) -> bool:
        """Whether `cat([a, b])` works: same arguments, per-sample shapes that agree, equal shared values."""
        return Conditioning.mismatch(a, b) is None

    @staticmethod
    def cat(items: Sequence[Conditioning]) -> Conditioning:
        """One batch of all samples of `items`, in order.

        Raises:
            ValueError: nothing given, or shapes or shared values do not agree; the message names the argument.
        """
        if not items:
            raise ValueError("Conditioning.cat wants at least one item")
        for number, item in enumerate(items[1:], start=1):
            reason = Conditioning.mismatch(items[0], item)
            if reason is not None:
                raise ValueError(
                    f"conditioning 0 and {number} cannot form one batch: {reason}; batch items of equal shapes instead"
                )
        if len(items) == 1:
            return items[0]
        # Of one kind at each path, as there was no mismatch.
        columns: list[dict[str, Any]] = [dict(leaves(item.tree)) for item in items]

        def join(path: str, node: Leaf | SampleList) -> Leaf | SampleList:
            parts = [column[path] for column in columns]
            if isinstance(node, SampleList):
                return SampleList(tuple(i for part in parts for i in part.items), node.rows, node.is_tuple)
            if node.rows == 0:
                return node
            return Leaf(torch.cat([part.value for part in parts]), node.rows)

        others = [Conditioning.cat(each) for each in zip(*(item.others for item in items), strict=True)]
        return Conditioning(map_paths(items[0].tree, join), sum(item.batch_size for item in items), others)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, without further answers; the tree stands as JSON in its metadata (no pickle).

        Raises:
            TypeError: a leaf is neither a tensor nor a plain value that JSON can hold.
        """
        tensors: dict[str, Tensor] = {}
        structure = encode(self.tree, tensors)
        metadata = {"format": FORMAT, "batch_size": str(self.batch_size), "tree": json.dumps(structure)}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Conditioning:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a saved Conditioning, or it is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no conditioning file at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:  # safetensors raises its own class, which it does not export everywhere
            raise ValueError(f"{path} is not a readable conditioning file ({error}); write it again") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a conditioning file of this version; write it again")
        return cls(decode(json.loads(metadata["tree"]), tensors), int(metadata["batch_size"]))


def _changed(node: Leaf | SampleList, change: Callable[[Tensor], Tensor]) -> Leaf | SampleList:
    if isinstance(node, SampleList):
        return SampleList(tuple(map_plain(item, change) for item in node.items), node.rows, node.is_tuple)
    return Leaf(map_plain(node.value, change), node.rows)


def mark(one: dict[str, Any], two: dict[str, Any], samples: int = 1) -> dict[str, Any]:
    """The tree of `one` (arguments at `samples` samples), leaves marked by comparison with `two` (those twice).

    A tensor with leading axis k in `one` and 2k in `two` is per sample (k / samples rows), a list likewise;
    what has the same shape in both is shared.

    Raises:
        ValueError: a leaf depends on the batch in another way; the message names it.
    """
    if one.keys() != two.keys():
        raise ValueError(f"the arguments {sorted(one.keys() ^ two.keys())} are passed at one batch size only")
    return {name: _mark(one[name], two[name], samples, name) for name in one}


def remark(arguments: dict[str, Any], marked: dict[str, Any], batch_size: int, *, more: bool = False) -> Conditioning:
    """Mark `arguments` (at `batch_size` samples) as the tree `marked` (any batch size) is marked.

    With `more`, a dict may hold what `marked` has not (a mask): a tensor is per sample where its leading axis is as
    long as the batch, anything else is shared.

    Raises:
        ValueError: the arguments have another structure than `marked`; the message names the place.
    """
    if missing := sorted(marked.keys() - arguments.keys() if more else marked.keys() ^ arguments.keys()):
        raise ValueError(f"the arguments {missing} are passed only sometimes")
    return Conditioning(_remark(arguments, marked, "", batch_size if more else None), batch_size)


def _mark(one: Any, two: Any, samples: int, path: str) -> Any:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.dim() == two.dim():
        if one.shape == two.shape:
            return Leaf(one)
        if two.shape[0] == 2 * one.shape[0] and one.shape[0] % samples == 0:
            return Leaf(one, one.shape[0] // samples)
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {name: _mark(one[name], two[name], samples, f"{path}.{name}") for name in one}
    elif isinstance(one, list | tuple) and type(one) is type(two):
        if len(one) == len(two):
            pairs = enumerate(zip(one, two, strict=True))
            return type(one)(_mark(a, b, samples, f"{path}[{i}]") for i, (a, b) in pairs)
        if len(two) == 2 * len(one) and len(one) % samples == 0:
            return SampleList(tuple(one), len(one) // samples, isinstance(one, tuple))
    elif not isinstance(one, Tensor) and type(one) is type(two) and one == two:
        return Leaf(one)
    raise ValueError(f"the argument {path} is {brief(one)} for one sample and {brief(two)} for two")


def _remark(value: Any, node: Any, path: str, more: int | None = None) -> Any:
    """With `more`, a batch size, dicts may hold further entries."""
    if isinstance(node, dict) and isinstance(value, dict):
        further = value.keys() - node.keys()
        if node.keys() <= value.keys() and (more is not None or not further):
            inside = f"{path}." if path else ""
            return {
                name: _mark_anew(value[name], more or 1, inside + name)
                if name in further
                else _remark(value[name], node[name], inside + name, more)
                for name in value
            }
    if isinstance(node, SampleList) and isinstance(value, list | tuple):
        return SampleList(tuple(value), node.rows, node.is_tuple)
    if isinstance(node, list | tuple) and type(value) is type(node) and len(value) == len(node):
        return type(node)(_remark(v, n, f"{path}[{i}]", more) for i, (v, n) in enumerate(zip(value, node, strict=True)))
    is_leaf = isinstance(node, Leaf) and not isinstance(value, dict | list | tuple)
    if is_leaf and isinstance(value, Tensor) == isinstance(node.value, Tensor):
        return Leaf(value, node.rows)
    raise ValueError(f"the argument {path} is {brief(value)} here and was {describe(node)} when recorded")


def _mark_anew(value: Any, batch_size: int, path: str) -> Any:
    if isinstance(value, dict):
        return {name: _mark_anew(inner, batch_size, f"{path}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        raise ValueError(f"the argument {path} is {brief(value)} here and was not passed when recorded")
    rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch_size
    return Leaf(value, int(rows))
