"""What a network is told besides the sample and the time: one tree per prompt or label.

A network's keyword arguments form a tree (dicts, lists, tuples) with leaves of three kinds:

- *per sample*: a tensor whose leading axis holds `rows` rows in a row for each sample. `rows` is 1 for a text embedding
  and the number of frames where a video pipeline repeats the text once per frame.
- *a list with entries per sample*: `rows` consecutive entries for each sample (ragged embeddings, image shapes).
- *shared*: position ids, rotary tables, plain numbers, None. Never indexed, and equal for all samples of one batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "fewstep-conditioning-1"


@dataclass(frozen=True)
class Leaf:
    """One leaf: a tensor, or a plain value. `rows` > 0: that many rows of the leading axis per sample; 0: shared."""

    value: Any
    rows: int = 0


@dataclass(frozen=True)
class SampleList:
    """A list (or tuple) with `rows` entries per sample; an entry is a tensor or a plain (nested) value."""

    items: tuple[Any, ...]
    rows: int
    is_tuple: bool = False


class Conditioning:
    """The keyword arguments of a network other than sample and time, for `batch_size` samples.

    Args:
        tree: argument name -> node, where a node is a dict, list or tuple of nodes, a `Leaf` or a `SampleList`.
        batch_size: the number of samples B. A network without any conditioning still has one.
    """

    def __init__(self, tree: dict[str, Any], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"a Conditioning holds at least one sample, not {batch_size}")
        for path, node in _nodes(tree):
            length = _length(node)
            if length is not None and length != node.rows * batch_size:
                raise ValueError(
                    f"the conditioning argument {path} has {length} rows for {batch_size} samples of {node.rows} each"
                )
        self.tree = tree
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"Conditioning(batch_size={self.batch_size}, {', '.join(self.describe())})"

    @property
    def batch_size(self) -> int:
        """The number of samples B."""
        return self._batch_size

    def describe(self) -> list[str]:
        """One text per leaf: its path, what it holds, and how it depends on the batch."""
        return [f"{path}: {_describe(node)}" for path, node in _nodes(self.tree)]

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments to pass to the network (fresh containers, the tensors themselves)."""
        return _plain(self.tree)

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
            return Leaf(node.value[torch.tensor(rows, device=node.value.device)], node.rows)

        return Conditioning(_map(self.tree, pick), len(positions))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move every tensor to `device`; cast the real floating-point ones to `dtype`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        return self.map_tensors(move)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Replace every tensor by `change(tensor)`, which must keep its leading axis."""

        def apply(node: Leaf | SampleList) -> Leaf | SampleList:
            if isinstance(node, SampleList):
                return SampleList(tuple(_map_plain(item, change) for item in node.items), node.rows, node.is_tuple)
            return Leaf(_map_plain(node.value, change), node.rows)

        return Conditioning(_map(self.tree, apply), self.batch_size)

    @staticmethod
    def mismatch(a: Conditioning, b: Conditioning) -> str | None:
        """Why `a` and `b` cannot form one batch (one phrase), or None when they can."""
        left, right = dict(_nodes(a.tree)), dict(_nodes(b.tree))
        if left.keys() != right.keys():
            return f"only one of them has {', '.join(sorted(left.keys() ^ right.keys()))}"
        for path, one in left.items():
            other = right[path]
            if type(one) is not type(other) or one.rows != other.rows:
                return f"{path} is {_describe(one)} in one and {_describe(other)} in the other"
            if isinstance(one, SampleList):
                continue  # lists exist because their entries may be ragged
            if not _joinable(one, other):
                return f"{path} is {_describe(one)} in one and {_describe(other)} in the other"
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
        columns = [dict(_nodes(item.tree)) for item in items]

        def join(path: str, node: Leaf | SampleList) -> Leaf | SampleList:
            parts = [column[path] for column in columns]
            if isinstance(node, SampleList):
                return SampleList(tuple(i for part in parts for i in part.items), node.rows, node.is_tuple)
            if node.rows == 0:
                return node
            return Leaf(torch.cat([part.value for part in parts]), node.rows)

        return Conditioning(_map_paths(items[0].tree, join), sum(item.batch_size for item in items))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the tree's structure stands as JSON in its metadata (no pickle).

        Raises:
            TypeError: a leaf is neither a tensor nor a plain value that JSON can hold.
        """
        tensors: dict[str, Tensor] = {}
        structure = _encode(self.tree, tensors)
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
        return cls(_decode(json.loads(metadata["tree"]), tensors), int(metadata["batch_size"]))


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


def remark(arguments: dict[str, Any], marked: dict[str, Any], batch_size: int) -> Conditioning:
    """Mark `arguments` (at `batch_size` samples) as the tree `marked` (any batch size) is marked.

    Raises:
        ValueError: the arguments have another structure than `marked`; the message names the place.
    """
    if arguments.keys() != marked.keys():
        raise ValueError(f"the arguments {sorted(arguments.keys() ^ marked.keys())} are passed only sometimes")
    return Conditioning({name: _remark(arguments[name], marked[name], name) for name in arguments}, batch_size)


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
    raise ValueError(f"the argument {path} is {_brief(one)} for one sample and {_brief(two)} for two")


def _remark(value: Any, node: Any, path: str) -> Any:
    if isinstance(node, dict) and isinstance(value, dict) and node.keys() == value.keys():
        return {name: _remark(value[name], node[name], f"{path}.{name}") for name in value}
    if isinstance(node, SampleList) and isinstance(value, list | tuple):
        return SampleList(tuple(value), node.rows, node.is_tuple)
    if isinstance(node, list | tuple) and type(value) is type(node) and len(value) == len(node):
        return type(node)(_remark(v, n, f"{path}[{i}]") for i, (v, n) in enumerate(zip(value, node, strict=True)))
    is_leaf = isinstance(node, Leaf) and not isinstance(value, dict | list | tuple)
    if is_leaf and isinstance(value, Tensor) == isinstance(node.value, Tensor):
        return Leaf(value, node.rows)
    raise ValueError(f"the argument {path} is {_brief(value)} here and was {_describe(node)} when recorded")


def _map_paths(node: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _map_paths(child, change, f"{path}.{name}" if path else name) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_map_paths(child, change, f"{path}[{i}]") for i, child in enumerate(node))
    return change(path, node)


def _map(node: Any, change: Callable[[Any], Any]) -> Any:
    return _map_paths(node, lambda _path, leaf: change(leaf))


def _nodes(node: Any, path: str = "") -> Iterator[tuple[str, Leaf | SampleList]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _nodes(child, f"{path}.{name}" if path else name)
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _nodes(child, f"{path}[{i}]")
    else:
        yield path, node


def _plain(node: Any) -> Any:
    def value(leaf: Leaf | SampleList) -> Any:
        if isinstance(leaf, SampleList):
            return tuple(leaf.items) if leaf.is_tuple else list(leaf.items)
        return leaf.value

    return _map(node, value)


def _map_plain(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _map_plain(child, change) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_plain(child, change) for child in value)
    return value


def _length(node: Leaf | SampleList) -> int | None:
    if isinstance(node, SampleList):
        return len(node.items)
    return node.value.shape[0] if node.rows else None


def _joinable(one: Leaf, other: Leaf) -> bool:
    a, b = one.value, other.value
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape[bool(one.rows) :] != b.shape[bool(one.rows) :]:
        return False
    return bool(one.rows) or torch.equal(a, b.to(a.device))


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, list | tuple) else f"({', '.join(_brief(v) for v in value)})"
    return text if len(text) <= 60 else text[:57] + "..."


def _describe(node: Any) -> str:
    if isinstance(node, SampleList):
        return f"list of {len(node.items)}, {node.rows} per sample"
    if isinstance(node, Leaf):
        return f"{_brief(node.value)}, {f'{node.rows} rows per sample' if node.rows else 'shared'}"
    return f"a {type(node).__name__} of {len(node)}"


def _encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree or a plain value: ["kind", ...]; tensors go to `tensors` under the name that the JSON holds."""
    if isinstance(node, Leaf):
        return ["leaf", node.rows, _encode(node.value, tensors)]
    if isinstance(node, SampleList):
        return ["samples", node.rows, node.is_tuple, [_encode(item, tensors) for item in node.items]]
    if isinstance(node, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().clone().contiguous()
        return ["tensor", name]
    if isinstance(node, dict):
        return ["dict", [[name, _encode(child, tensors)] for name, child in node.items()]]
    if isinstance(node, list | tuple):
        return ["tuple" if isinstance(node, tuple) else "list", [_encode(child, tensors) for child in node]]
    if node is None or isinstance(node, bool | int | float | str):
        return ["value", node]
    if isinstance(node, torch.dtype):
        return ["dtype", str(node).removeprefix("torch.")]
    raise TypeError(f"a conditioning with a {type(node).__name__} cannot be saved: only tensors and plain values can")


def _decode(code: list[Any], tensors: dict[str, Tensor]) -> Any:
    kind, *rest = code
    if kind == "leaf":
        return Leaf(_decode(rest[1], tensors), rest[0])
    if kind == "samples":
        return SampleList(tuple(_decode(item, tensors) for item in rest[2]), rest[0], rest[1])
    if kind == "tensor":
        return tensors[rest[0]]
    if kind == "dict":
        return {name: _decode(child, tensors) for name, child in rest[0]}
    if kind in ("list", "tuple"):
        children = [_decode(child, tensors) for child in rest[0]]
        return tuple(children) if kind == "tuple" else children
    return getattr(torch, rest[0]) if kind == "dtype" else rest[0]
