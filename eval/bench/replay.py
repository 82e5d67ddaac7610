"""The calls of a method's networks, noted while its steps run and played again with nothing around them.

What a step takes beyond this and its optimizer is what the method, the loop and the batches cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fewstep.data.batch import Batch
from fewstep.eval.bench.runs import Run
from fewstep.kernels.dispatch import has_tangent
from fewstep.networks.features import FeatureTap
from fewstep.networks.roles import NetworkRole
from fewstep.training.method import Renew, Turn


@dataclass(eq=False)
class Call:
    """One call of a network.

    Attributes:
        name: of the role that was asked.
        role: of its one network that answered.
        tap: where it ended, None at its end.
        args: positional ones.
        kwargs: further ones.
        follows: the floating inputs, by place among all leaves, through which a gradient could flow.
        updates: the role in whose turn something flowed back through it; None where nothing did.
    """

    name: str
    role: NetworkRole
    tap: FeatureTap | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    follows: tuple[int, ...] = ()
    updates: str | None = None


class Replay:
    """The calls of a case's steps.

    Args:
        run: whose case is played once, to note them.

    Attributes:
        possible: whether they can be played again; calls that carry a tangent are not.
    """

    def __init__(self, run: Run) -> None:
        #: By step.
        self.calls: dict[int, list[Call]] = {}
        self.possible = True
        #: The role of every update, by step, in order.
        self.turns: dict[int, list[str]] = {}
        self._tap: FeatureTap | None = None
        self._calls: list[Call] = []
        self._role = ""
        with ExitStack() as stack:
            turns = run.method.turns
            run.method.turns = partial(self._turns, turns)
            stack.callback(delattr, run.method, "turns")
            networks: set[nn.Module] = set()
            for name, role in run.method.roles.items():
                for expert in role.experts.values():
                    denoiser: Any = expert.denoiser
                    denoiser.on_call = partial(self._called, name, expert)
                    denoiser.features = partial(self._tapped, denoiser.features)
                    stack.callback(delattr, denoiser, "features")
                    stack.callback(setattr, denoiser, "on_call", _unwatched)
                    networks.add(denoiser.network)
            for network in networks:
                stack.callback(network.register_forward_pre_hook(self._note, prepend=True, with_kwargs=True).remove)
            for step in run.case.steps:
                run.play(step)

    def play(self, step: int) -> None:
        """The calls of a step in order, each with the backward pass that it had."""
        for call in self.calls[step]:
            self._play(call)

    def _play(self, call: Call) -> None:
        network, active = call.role.denoiser.network, call.role.denoiser.active
        leaves = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        trained = call.updates == call.name
        with torch.set_grad_enabled(call.updates is not None):
            for place in call.follows:
                leaves[place].requires_grad_(call.updates is not None and not trained)
            tapped: AbstractContextManager[Any] = nullcontext() if call.tap is None else call.tap.on(network)
            with active(), tapped as seen:
                answer = network(*call.args, **(call.kwargs or {}))
            if call.updates is None:
                return
            out = _first(answer) if call.tap is None else seen.features
            wanted = call.role.parameters() if trained else [leaves[place] for place in call.follows]
            torch.autograd.backward(out, torch.ones_like(out), inputs=wanted)
            for leaf in wanted:
                leaf.grad = None

    # --- noting -------------------------------------------------------------------------------------------------

    def _turns(self, turns: Any, step: int, batch: Batch) -> Iterator[Turn | Renew]:
        self._calls = self.calls.setdefault(step, [])
        for turn in turns(step, batch):
            self.turns.setdefault(step, []).append(turn.role)
            self._role = turn.role
            yield turn

    def _tapped(self, features: Any, x_t: Tensor, t: Tensor, conditioning: Any, tap: FeatureTap) -> Tensor:
        self._tap = tap
        try:
            return features(x_t, t, conditioning, tap)
        finally:
            self._tap = None

    def _called(self, name: str, role: NetworkRole, _x_t: Tensor, _t: Tensor, _early: bool) -> Callable[[Tensor], None]:
        call = Call(name, role, self._tap)
        self._calls.append(call)
        return partial(self._answered, call)

    def _note(self, _network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._calls[-1]
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.possible &= not has_tangent(*leaves)
        call.follows = tuple(place for place, leaf in enumerate(leaves) if leaf.requires_grad)
        call.args, call.kwargs = tree_map(_detached, (args, kwargs))

    def _answered(self, call: Call, answer: Tensor) -> None:
        if answer.requires_grad:
            answer.register_hook(lambda _gradient: setattr(call, "updates", self._role))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _first(answer: Any) -> Tensor:
    """The tensor that a network gives, in whatever it is wrapped."""
    return next(leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))


def _unwatched(_x_t: Tensor, _t: Tensor, _early: bool) -> Callable[[Tensor], None]:
    return lambda _answer: None
