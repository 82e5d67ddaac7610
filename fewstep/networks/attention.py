"""Which attention runs in a run's own networks, by diffusers' names; no other model's changes.

diffusers' ``set_attention_backend`` passes over processors that know no backend (all of a UNet's and of SD3's), without
a word, and also sets what every other model of the process takes by default. Here the processors of one network are
replaced, and nothing else: one that knows a backend is told it, and what any other hands to torch's
``scaled_dot_product_attention`` goes to the backend. A derivative needs attention that can be differentiated forward:
inside of one those others are as they were, and :mod:`fewstep.networks.derivative` sees to the rest.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def require_backend(backend: str) -> None:
    """Raise where a backend's library is not there.

    Raises:
        RuntimeError: what to install.
    """
    if backend == "xformers" and find_spec("xformers") is None:
        raise RuntimeError('xformers is not installed: pip install "fewstep[xformers]"')
    _check_attention_backend_requirements(AttentionBackendName(backend))


def switch_attention(networks: Iterable[nn.Module], backend: str) -> Callable[[], None]:
    """Let the attention of these networks run in a backend. Returns what takes that back.

    Args:
        networks: of a run; their processors are replaced, not changed.
        backend: one of :func:`fewstep.config.attention.known_backends`, not ``auto``. Whether it can run here is not
            looked at.
    """
    chosen = AttentionBackendName(backend)
    before = [(module, module.processor) for network in networks for module in _processed(network)]
    for module, processor in before:
        module.processor = _told(processor, chosen) if _knows_backends(processor) else _redirected(processor, chosen)

    def take_back() -> None:
        for module, processor in before:
            module.processor = processor

    return take_back


def describe_processors(network: nn.Module) -> str:
    """The processors of a network by class, with how many there are and how they are told a backend."""
    found = Counter(
        f"{type(m.processor).__name__} ({'by its own switch' if _knows_backends(m.processor) else 'through SDPA'})"
        for m in _processed(network)
    )
    return ", ".join(f"{count} {words}" for words, count in found.items()) or "no attention processors"


def _processed(network: nn.Module) -> list[Any]:
    """The modules whose attention is a processor's. A processor that is a module has weights, and is left alone."""
    modules: list[Any] = list(network.modules())
    return [m for m in modules if callable(p := getattr(m, "processor", None)) and not isinstance(p, nn.Module)]


def _knows_backends(processor: Any) -> bool:
    return hasattr(processor, "_attention_backend")


def _told(processor: Any, backend: AttentionBackendName) -> Any:
    own = copy.copy(processor)
    own._attention_backend = backend
    return own


def _redirected(processor: Any, backend: AttentionBackendName) -> Any:
    """A processor of a subclass, since networks and pipelines ask for the class and for the call's arguments."""
    kind: Any = getattr(processor, "_before_redirection", type(processor))
    own = copy.copy(processor)
    own.__class__ = kind if backend is AttentionBackendName.NATIVE else _redirecting_class(kind, backend)
    return own


@functools.cache
def _redirecting_class(kind: Any, backend: AttentionBackendName) -> type:
    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            return kind.__call__(self, *args, **kwargs)
        with _Redirecting(backend):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "_before_redirection": kind})


class _Redirecting(TorchFunctionMode):
    """Inside, torch's attention of queries, keys and values (B, heads, N, D) runs in a backend."""

    def __init__(self, backend: AttentionBackendName) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.dim() != 4:
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)
        order = [tensor.transpose(1, 2) for tensor in (query, key, value)]  # (B, N, heads, D), as diffusers has them
        return dispatch_attention_fn(*order, *args, **kwargs, backend=self.backend).transpose(1, 2)
