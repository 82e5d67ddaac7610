"""Hooks on modules and methods replaced, for the length of a context: every call is seen, and may be changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

#: How many contexts of :func:`hooked` are open.
_open = 0


def any_hooked() -> bool:
    """Whether modules are hooked now. A compiled network passes over hooks that came after it was compiled."""
    return _open > 0


@contextlib.contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any] | None = None,
    after: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any] | None = None,
) -> Iterator[None]:
    """Inside, the modules' forward passes are hooked; afterwards the hooks are gone, whatever was raised.

    Args:
        modules: by the names under which the hooks are told of them.
        before: called with (name, module, args, kwargs) before a pass; a pair (args, kwargs) that it returns takes
            their place, None leaves them.
        after: called with (name, module, args, kwargs, output) after a pass; what it returns takes the place of the
            output, None leaves it.
    """
    global _open
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                stack.callback(module.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(partial(after, name), with_kwargs=True).remove)
        _open += 1
        try:
            yield
        finally:
            _open -= 1


@contextlib.contextmanager
def method_replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a function takes the place of one of the owner's methods; a replacement that it had comes back."""
    own = {name: owner.__dict__[name]} if name in owner.__dict__ else {}
    owner.__dict__[name] = function
    try:
        yield
    finally:
        del owner.__dict__[name]
        owner.__dict__.update(own)
