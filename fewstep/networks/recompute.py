"""Gradient checkpointing of a network that is several things in turn: a block runs again as what it was at first."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.checkpoint import checkpoint

#: Makes the context of a pass once more: the role that was active, and what it was told.
Reenter = Callable[[], AbstractContextManager[None]]


def checkpointed(
    block: Callable[..., Any], args: tuple[Any, ...], reenter: Reenter, inside: Callable[[], bool] = lambda: False
) -> Any:
    """``block(*args)``, whose activations are computed again in the backward pass, inside ``reenter()``.

    Args:
        block: of the network.
        args: of it.
        reenter: captured in the forward pass; by the time of the backward pass another role may be active.
        inside: whether that context is the present one, and need not be entered. It is so in every first run, and in a
            compiled graph, which has it traced in, forward and backward.
    """

    def run(*args: Any) -> Any:
        if inside():
            return block(*args)
        with reenter():
            return block(*args)

    return checkpoint(run, *args, use_reentrant=False)
