"""An attention backend is tried before it is relied on: the run's networks, forward and backward, on their device.

What is asked for and what runs are two things: a processor may heed no backend, a library hands on to another one, and
some have no backward pass. So the trial watches which functions are called, reads in the graph which kernels the
backward pass will take, and compares answer and gradients with those of the networks as they were.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.attention import AUTO, refuse_unknown_backend
from fewstep.errors import one_line
from fewstep.networks.attention import require_backend, switch_attention
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.roles import Role
from fewstep.recording.rules.dtypes import network_dtype

#: How far an answer and gradients may be from those before, relative: one float32 pass and one in half precision.
_CLOSE = {False: (1e-3, 1e-2), True: (5e-2, 2e-1)}
_KERNEL = re.compile(r"(?i)attention|attn|fmha|softmax|flash|sage")


@dataclass(frozen=True)
class Ran:
    """The attention of one pass.

    Attributes:
        calls: how often by backend; torch's own is ``native``.
        kernels: what of it the backward pass walks, by autograd's names.
    """

    calls: Mapping[str, int]
    kernels: frozenset[str]

    def describe(self) -> str:
        """In words: ``xformers in 14 of 16 attention calls, native in 2 (_fMHA)``."""
        total = sum(self.calls.values())
        parts: list[str] = []
        for backend, count in self.calls.items():
            parts.append(f"{backend} in {count}" + ("" if parts else f" of {total} attention calls"))
        kernels = f" ({', '.join(sorted(self.kernels))})" if self.kernels else ""
        return (", ".join(parts) or "no attention that can be told apart") + kernels


@dataclass(frozen=True)
class Passed:
    """A pass forward and backward: what ran, the answer, and gradients, None where there is none."""

    ran: Ran
    answer: Tensor
    gradients: list[Tensor | None]


def use_attention_backend(
    roles: Mapping[str, Role], backend: str, x: Tensor, t: Tensor, conditionings: Sequence[AnyConditioning]
) -> str:
    """Let the networks of roles run their attention in a backend where that is right, else leave them as they are.

    Args:
        roles: of a run, before its training.
        backend: one of :func:`fewstep.config.attention.known_backends`.
        x: a sample (B, ...).
        t: times (B,).
        conditionings: of B samples each; every one is tried.

    Returns:
        What runs from now on, in one line; empty for ``auto``, where nothing is tried.

    Raises:
        UserError: there is no such backend.
    """
    refuse_unknown_backend(backend)
    if backend == AUTO:
        return ""
    subjects = _subjects(roles)
    networks = {id(denoiser.network): denoiser.network for denoiser, _ in _all(roles)}
    kinds = ", ".join(dict.fromkeys(type(network).__name__ for network in networks.values()))

    def passes() -> list[Passed]:
        return [passed(*one, x, t, conditioning) for one in subjects for conditioning in conditionings]

    before = passes()
    take_back = switch_attention(networks.values(), backend)
    try:
        require_backend(backend)
        after = passes()
        reason = _misfit(subjects, before, after, backend)
    except Exception as error:  # a backend raises whatever its library does
        reason = one_line(error)[:200].rstrip(".")
    if not reason:
        return f"attention of {kinds}: {_together(after).describe()}, tried forward and backward"
    take_back()
    return f"--attention_backend {backend} cannot be used by {kinds}: {reason}; {_together(before).describe()} instead"


def passed(
    denoiser: NetworkDenoiser, parameters: Sequence[Tensor], x: Tensor, t: Tensor, conditioning: AnyConditioning
) -> Passed:
    """One pass of a network, forward and backward, and the attention that ran in it.

    Args:
        denoiser: of a role.
        parameters: whose gradients are wanted beside the sample's.
        x: a sample (B, ...).
        t: times (B,).
        conditioning: of B samples.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        with observed() as calls:
            answer = denoiser.raw(x, t, conditioning)
        kernels = _kernels(answer)
        gradients = torch.autograd.grad(answer.float().square().mean(), [x, *parameters], allow_unused=True)
    return Passed(Ran(dict(calls), kernels), answer.detach(), list(gradients))


@contextmanager
def observed() -> Iterator[Counter[str]]:
    """Inside, attention calls are counted by the backend that is called, of diffusers' dispatcher or torch's own."""
    calls: Counter[str] = Counter()
    watch = _Watch(calls)
    backends = _AttentionBackendRegistry._backends
    before = dict(backends)
    backends.update({name: watch.inside(name.value, function) for name, function in before.items()})
    try:
        with watch:
            yield calls
    finally:
        backends.update(before)


class _Watch(TorchFunctionMode):
    """Counts torch's own attention where no backend of the dispatcher calls it."""

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__()
        self.calls, self.dispatched = calls, False

    def inside(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            self.dispatched = True
            try:
                return function(*args, **kwargs)
            finally:
                self.dispatched = False

        return run

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and not self.dispatched:
            self.calls["native"] += 1
        return func(*args, **(kwargs or {}))


def _all(roles: Mapping[str, Role]) -> list[tuple[NetworkDenoiser, list[Tensor]]]:
    """The denoisers of all networks of all roles, with the parameters that each role trains there."""
    return [
        (expert.denoiser, [p for p in expert.weights.parameters() if p.requires_grad])
        for role in roles.values()
        for expert in role.experts.values()
    ]


def _subjects(roles: Mapping[str, Role]) -> list[tuple[NetworkDenoiser, list[Tensor]]]:
    """One of every kind: networks of one class, in one dtype, trained alike, take the same attention."""
    subjects: dict[tuple[object, ...], tuple[NetworkDenoiser, list[Tensor]]] = {}
    for denoiser, parameters in _all(roles):
        kind = (denoiser.recipe.component, type(denoiser.network), network_dtype(denoiser.network), denoiser.autocast)
        subjects.setdefault((*kind, bool(parameters)), (denoiser, parameters))
    return list(subjects.values())


def _misfit(
    subjects: Sequence[tuple[NetworkDenoiser, Sequence[Tensor]]],
    before: Sequence[Passed],
    after: Sequence[Passed],
    backend: str,
) -> str:
    """Why what ran cannot be used; empty where it can."""
    if not all(one.ran.calls.get(backend) for one in after):
        return "no attention layer takes it"
    count = len(before) // len(subjects)
    pairs = list(zip(before, after, strict=True))
    close = [_CLOSE[is_half(subjects[index // count][0])] for index in range(len(pairs))]
    if not all(apart([a.answer], [b.answer]) <= most for (a, b), (most, _) in zip(pairs, close, strict=True)):
        return "its answer is another one"
    gradients = [[(g, h) for g, h in zip(a.gradients, b.gradients, strict=True) if g is not None] for a, b in pairs]
    if any(h is None for both in gradients for _, h in both):
        return "it has no backward pass"
    for both, (_, most) in zip(gradients, close, strict=True):
        if not apart([g for g, _ in both], [h for _, h in both if h is not None]) <= most:
            return "its gradients are others"
    return ""


def is_half(denoiser: NetworkDenoiser) -> bool:
    """Whether its network computes in half precision."""
    return network_dtype(denoiser.network).itemsize < 4 or denoiser.autocast is not None


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The norm of the difference of all tensors relative to that of ours."""
    if not ours:
        return 0.0
    error, size = (
        torch.stack([(a.float() - b.float() if other else a.float()).norm() for a, b in zip(ours, theirs, strict=True)])
        for other in (True, False)
    )
    return float(error.norm() / size.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _together(passes: Sequence[Passed]) -> Ran:
    calls: Counter[str] = Counter()
    for one in passes:
        calls.update(one.ran.calls)
    return Ran(dict(calls.most_common()), frozenset().union(*(one.ran.kernels for one in passes)))


def _kernels(answer: Tensor) -> frozenset[str]:
    """The nodes of a graph that are attention, by name."""
    found, seen, left = set(), set(), [answer.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _KERNEL.search(node.name()):
            found.add(re.sub(r"Backward\d*$", "", node.name()))
        left += [following for following, _ in node.next_functions]
    return frozenset(found)
