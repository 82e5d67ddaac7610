"""Copies of what passes through a network, taken at once: pipelines overwrite their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def capture(value: Any, known: Sequence[Tensor] = ()) -> Any:
    """A copy of nested containers with every tensor cloned: pipelines write the next sample into the same storage.

    A tensor that is one of some `known` copies is that copy: what one network answers, another one may be told.
    """
    return _map_tensors(value, lambda tensor: _copied(tensor, known))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map_tensors(value, note)
    return found


def capture_unless(value: Any, *known: Any) -> Any:
    """`capture`, or the first of some captures that is the same: what stands still from step to step is kept once."""
    for one in known:
        if _same(value, one):
            return one
    return capture(value)


def scrambled(value: Any, generator: torch.Generator) -> Any:
    """A copy of nested containers with noise of mean 1 and variance 1, float32, in the place of every float tensor."""

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone()
        # Of many numbers about 0 the deviation is the norm: which of them a pipeline takes would not show.
        return 1 + torch.randn(tensor.shape, generator=generator).to(tensor.device)

    return _map_tensors(value, noise)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, dict):  # a diffusers or transformers output class, which drops its empty fields
        return type(value)(**{key: _map_tensors(item, change) for key, item in value.items()})
    return value


def capture_changes(
    arguments: dict[str, Any], previous: dict[str, Any], known: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """`capture`, but what equals the previous call's argument is shared with it: embeddings are cloned once."""
    return {
        name: previous[name] if _same(value, previous.get(name)) else capture(value, known)
        for name, value in arguments.items()
    }


def _copied(tensor: Tensor, known: Sequence[Tensor]) -> Tensor:
    for one in known:
        if _same(tensor, one):
            return one
    return tensor.detach().clone()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return False
