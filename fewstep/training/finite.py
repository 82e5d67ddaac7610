"""Numbers that are not finite: whether there are any, asked of the device; then where they are, looked for slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.networks.roles import FOLLOWERS, Role
from fewstep.recording.watch.hooks import hooked
from fewstep.training.method import Method, Turn


def any_not_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether any number in any of the tensors is not finite, () on their device; the host waits for nothing."""
    floating = [_here(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floating:
        return torch.zeros((), dtype=torch.bool)
    # The largest magnitude of each: one pass, it passes nan on, and unlike a sum of squares it cannot overflow.
    largest = torch._foreach_norm(floating, float("inf"))
    return ~torch.isfinite(torch.stack([norm.float() for norm in largest])).all()


def _here(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this process."""
    local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor.detach() if local is None else local().detach()


def find_held(roles: Mapping[str, Role], states: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, str] | None:
    """The role and words for the first tensor of a run with a number that is not finite; None where all are finite.

    Args:
        roles: of the run. Frozen ones, from which the others learn, are looked at before those that are trained, and
            averages at last.
        states: of the trained roles' optimizers, by role; they are looked at before the weights that come of them.
    """
    for name in sorted(roles, key=lambda name: (name in FOLLOWERS, name in states)):
        for key, value in states.get(name, {}).items():
            if any_not_finite([value]):
                parameter, _, what = key.rpartition("/")
                return name, f"{what} of {parameter} in the optimizer of the {name}"
        for network in (*(one.denoiser.network for one in roles[name].experts.values()), roles[name].weights):
            if (bad := _first_bad(network)) is not None:
                return name, f"the weight {bad} of the {name}'s network"
        for part, module in roles[name].added.items():
            if (bad := _first_bad(module)) is not None:
                return name, f"the weight {bad} of the {name}'s {part}"
    return None


def _first_bad(module: nn.Module) -> str | None:
    values = [*module.named_parameters(), *module.named_buffers()]
    return next((name for name, value in values if any_not_finite([value])), None)


@dataclass
class _Search:
    """What is met first in a step that is played again."""

    role: str = ""
    found: list[str] = field(default_factory=list)

    def called(self, role: str, x_t: Tensor, t: Tensor, _early: bool) -> Callable[[Tensor], None]:
        self.role = role
        if any_not_finite([x_t]):
            self.found.append(f"in the sample that the {role} is given, before its forward pass")
        return lambda _answer: None

    def ran(self, name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if not self.found and any_not_finite(tensors_in(output)):
            self.found.append(f"in the forward pass of the {self.role}: the output of {name or 'its network'}")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a module gives: a tensor, or tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)


def find_in_step(
    method: Method, step: int, batches: Iterable[Batch], parameters: Mapping[str, Mapping[str, nn.Parameter]]
) -> str | None:
    """Play a step again without updating anything, and say where in it a number is not finite for the first time.

    Args:
        method: of the run, with the weights that it had.
        step: to be played.
        batches: the micro-batches of the step, played one after the other.
        parameters: of each trained role, by name.

    Returns:
        Words that go on after "not finite", None where everything is finite this time.
    """
    search, first = _Search(), None
    with _watched(method.roles, search):
        for batch in batches:
            for turn in method.turns(step, batch):
                # It is played to its end whatever is found: what a method sums over processes, all of them have to ask.
                if first is None and isinstance(turn, Turn):  # an order was carried out when the step was played
                    found = search.found or _in_turn(turn, parameters[turn.role])
                    first = found[0] if found else None
    return first


def _in_turn(turn: Turn, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    if any_not_finite(tensor for tensor, _ in turn.backward):
        logged = [name for name, value in turn.log.items() if any_not_finite([value])]
        return [f"in the loss of the {turn.role}" + (f": {', '.join(logged)}" if logged else "")]
    if any_not_finite(gradient for _, gradient in turn.backward if gradient is not None):
        return [f"in the gradient at the samples of the {turn.role}"]
    tensors = [tensor for tensor, _ in turn.backward]
    gradients = [torch.ones_like(t) if g is None else g.to(t.dtype) for t, g in turn.backward]
    torch.autograd.backward(tensors, gradients, inputs=list(parameters.values()))
    bad = [name for name, p in parameters.items() if p.grad is not None and any_not_finite([p.grad])]
    for parameter in parameters.values():
        parameter.grad = None
    if not bad:
        return []
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    # The last in the order of the network is the first that the backward pass comes to.
    return [f"in the backward pass of the {turn.role}: the gradient of {bad[-1]}{more}"]


@contextmanager
def _watched(roles: Mapping[str, Role], search: _Search) -> Iterator[None]:
    networks = [one.denoiser for name in roles for one in roles[name].experts.values()]
    names = [name for name in roles for _ in roles[name].experts]
    added = [module for role in roles.values() for module in role.added.values()]
    noted = [(buffer, buffer.clone()) for module in added for buffer in module.buffers()]  # f-distill's bins
    before = [(denoiser.on_call, denoiser.without_gradient) for denoiser in networks]
    seen: set[int] = set()
    with ExitStack() as stack:
        for module in (*(denoiser.network for denoiser in networks), *added):
            if id(module) not in seen:  # adapters share their network
                stack.enter_context(hooked(dict(module.named_modules()), after=search.ran))
                seen.add(id(module))
        for denoiser, name in zip(networks, names, strict=True):
            denoiser.on_call, denoiser.without_gradient = partial(search.called, name), None  # the hooked one is run
        try:
            yield
        finally:
            for denoiser, own in zip(networks, before, strict=True):
                denoiser.on_call, denoiser.without_gradient = own
            for buffer, value in noted:
                buffer.copy_(value)
