"""The tree of a network's keyword arguments: its two kinds of nodes that know about samples, and walks over it.

A tree is made of dicts, lists and tuples with :class:`Leaf` and :class:`SampleList` at its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def map_paths(node: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """The tree with `change(path, leaf)` in the place of each leaf."""
    if isinstance(node, dict):
        return {name: map_paths(child, change, f"{path}.{name}" if path else name) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(map_paths(child, change, f"{path}[{i}]") for i, child in enumerate(node))
    return change(path, node)


def map_leaves(node: Any, change: Callable[[Any], Any]) -> Any:
    """The tree with `change(leaf)` in the place of each leaf."""
    return map_paths(node, lambda _path, leaf: change(leaf))


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Leaf | SampleList]]:
    """Each leaf with its path, in order."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from leaves(child, f"{path}.{name}" if path else name)
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from leaves(child, f"{path}[{i}]")
    else:
        yield path, node


def plain(node: Any) -> Any:
    """The tree as the plain containers and values that a network is called with."""

    def value(leaf: Leaf | SampleList) -> Any:
        if isinstance(leaf, SampleList):
            return tuple(leaf.items) if leaf.is_tuple else list(leaf.items)
        return leaf.value

    return map_leaves(node, value)


def map_plain(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain value with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_plain(child, change) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_plain(child, change) for child in value)
    return value


def length_of(node: Leaf | SampleList) -> int | None:
    """Entries of the leading axis or list of a per-sample leaf; None for a shared one."""
    if isinstance(node, SampleList):
        return len(node.items)
    return node.value.shape[0] if node.rows else None


def joinable(one: Leaf, other: Leaf) -> bool:
    """Whether two leaves may stand in one batch: equal where shared, of equal shapes beyond the leading axis else."""
    a, b = one.value, other.value
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape[bool(one.rows) :] != b.shape[bool(one.rows) :]:
        return False
    return bool(one.rows) or a is b or torch.equal(a, b.to(a.device))


def brief(value: Any) -> str:
    """A plain value in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple) and len(value) > 3:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, list | tuple) else f"({', '.join(brief(v) for v in value)})"
    return text if len(text) <= 60 else text[:57] + "..."


def describe(node: Any) -> str:
    """A node in a few words."""
    if isinstance(node, SampleList):
        return f"list of {len(node.items)}, {node.rows} per sample"
    if isinstance(node, Leaf):
        return f"{brief(node.value)}, {f'{node.rows} rows per sample' if node.rows else 'shared'}"
    return f"a {type(node).__name__} of {len(node)}"


def encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a tree or a plain value: ["kind", ...]; tensors go to `tensors` under the name that the JSON holds."""
    if isinstance(node, Leaf):
        return ["leaf", node.rows, encode(node.value, tensors)]
    if isinstance(node, SampleList):
        return ["samples", node.rows, node.is_tuple, [encode(item, tensors) for item in node.items]]
    if isinstance(node, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = node.detach().cpu().clone().contiguous()
        return ["tensor", name]
    if isinstance(node, dict):
        return ["dict", [[name, encode(child, tensors)] for name, child in node.items()]]
    if isinstance(node, list | tuple):
        return ["tuple" if isinstance(node, tuple) else "list", [encode(child, tensors) for child in node]]
    if node is None or isinstance(node, bool | int | float | str):
        return ["value", node]
    if isinstance(node, torch.dtype):
        return ["dtype", str(node).removeprefix("torch.")]
    raise TypeError(f"a conditioning with a {type(node).__name__} cannot be saved: only tensors and plain values can")


def decode(code: list[Any], tensors: Mapping[str, Tensor]) -> Any:
    """The tree or plain value that `encode` turned into JSON.

    Raises:
        ValueError, TypeError, IndexError, KeyError: `encode` did not write it.
    """
    kind, *rest = code
    if kind == "leaf":
        return Leaf(decode(rest[1], tensors), rest[0])
    if kind == "samples":
        return SampleList(tuple(decode(item, tensors) for item in rest[2]), rest[0], rest[1])
    if kind == "tensor":
        return tensors[rest[0]]
    if kind == "dict":
        return {name: decode(child, tensors) for name, child in rest[0]}
    if kind in ("list", "tuple"):
        children = [decode(child, tensors) for child in rest[0]]
        return tuple(children) if kind == "tuple" else children
    if kind == "dtype":
        dtype = getattr(torch, rest[0])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{rest[0]} is no dtype")
        return dtype
    if kind != "value":
        raise ValueError(f"there is no node of the kind {kind!r}")
    return rest[0]
