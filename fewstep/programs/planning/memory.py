"""How many bytes of tensors are alive while code runs, and the largest such sum: on real tensors and on fake ones.

Storages are counted, each once, from the moment an operation makes them until nothing refers to them: activations that
a graph keeps, gradients, and what operations need for a moment. What a kernel takes for itself while it runs is not
seen, nor what an allocator keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Footprint(TorchDispatchMode):
    """Inside, new storages are counted.

    Args:
        known: tensors whose storages count as there already: not as new where an operation returns them.

    Attributes:
        alive: bytes of the new storages that are in use now.
        peak: the largest value of `alive` since the start or :meth:`restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that their numbers stay theirs
        self._known_numbers = {storage._cdata for storage in self._known}

    def restart(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak = self.alive

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._known_numbers or number in self._storages:
            return
        self._storages[number] = (weakref.ref(storage, lambda _: self._freed(number)), size)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _freed(self, number: int) -> None:
        _, size = self._storages.pop(number)
        self.alive -= size


def tensor_bytes(*owners: nn.Module | Iterable[Tensor]) -> int:
    """Bytes of the parameters and buffers of modules, and of single tensors; a storage counts once."""
    sizes: dict[int, int] = {}
    for owner in owners:
        tensors = [*owner.parameters(), *owner.buffers()] if isinstance(owner, nn.Module) else owner
        for inner in (inner for tensor in tensors for inner in _held(tensor)):
            storage = inner.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _held(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor itself; of one that is made of others (a quantised weight and its scales) these."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _held(getattr(tensor, name))
