"""The calls of a method's networks, noted while its steps run and played again with nothing around them.

What a step takes beyond this and its optimizer is what the method, the loop and the batches cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.eval.bench.runs import Run
from fewstep.kernels.dispatch import has_tangent
from fewstep.networks.features import FeatureTap
from fewstep.networks.roles import NetworkRole
from fewstep.recording import Recipe
from fewstep.training.method import Order, Pull, Turn


@dataclass(eq=False)
class Call:
    """One call of a network.

    Attributes:
        name: of the role that was asked.
        role: of its one network that answered.
        tap: where it ended, None at its end.
        network: that was called.
        play: makes the call once more; it is given x (B, ...).
        x: the input (B, ...).
        follows: whether a gradient could flow to x.
        updates: the role in whose turn something flowed back through it; None where nothing did.
    """

    name: str
    role: NetworkRole
    tap: FeatureTap | None
    play: Callable[[Tensor], Tensor] = field(init=False)
    network: nn.Module = field(init=False)
    x: Tensor = field(init=False)
    follows: bool = False
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
            for name, role in run.method.roles.items():
                for expert in role.experts.values():
                    denoiser: Any = expert.denoiser
                    stack.callback(setattr, denoiser, "recipe", denoiser.recipe)
                    stack.callback(setattr, denoiser, "on_call", _unwatched)
                    stack.callback(delattr, denoiser, "features")
                    denoiser.on_call = partial(self._called, name, expert)
                    denoiser.features = partial(self._tapped, denoiser.features)
                    denoiser.recipe = _Noted(denoiser.recipe, self)
            for step in run.case.steps:
                run.play(step)

    def play(self, step: int) -> None:
        """The calls of a step in order, each with the backward pass that it had."""
        for call in self.calls[step]:
            self._play(call)

    def _play(self, call: Call) -> None:
        trained = call.updates == call.name
        x = call.x.detach().requires_grad_(call.follows and call.updates is not None and not trained)
        with torch.set_grad_enabled(call.updates is not None):
            tapped: AbstractContextManager[Any] = nullcontext() if call.tap is None else call.tap.on(call.network)
            with call.role.denoiser.active(), tapped as seen:
                answer = call.play(x)
            if call.updates is None:
                return
            out = answer if call.tap is None else seen.features
            wanted: Sequence[Tensor] = call.role.parameters() if trained else [x]
            torch.autograd.backward(out, torch.ones_like(out), inputs=wanted)
            for leaf in wanted:
                leaf.grad = None

    # --- noting -------------------------------------------------------------------------------------------------

    def _turns(self, turns: Any, step: int, batch: Batch) -> Iterator[Turn | Order]:
        self._calls = self.calls.setdefault(step, [])
        for turn in turns(step, batch):
            if not isinstance(turn, Pull):  # which calls no network
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

    def note(self, recipe: Recipe, network: nn.Module, x: Tensor, timestep: Tensor, told: Any, **how: Any) -> None:
        """Keep what the call that goes on now is made with."""
        call = self._calls[-1]
        self.possible &= not has_tangent(x, timestep)
        call.network, call.x, call.follows = network, x.detach(), x.requires_grad
        time = timestep.detach()
        call.play = lambda x: recipe.call(network, x, time, told, **how)

    def _answered(self, call: Call, answer: Tensor) -> None:
        if answer.requires_grad:
            answer.register_hook(lambda _gradient: setattr(call, "updates", self._role))


class _Noted:
    """A recipe whose calls are noted."""

    def __init__(self, recipe: Recipe, replay: Replay) -> None:
        self._recipe, self._replay = recipe, replay

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the recipe's."""
        self._replay.note(self._recipe, *args, **kwargs)
        return self._recipe.call(*args, **kwargs)


def _unwatched(_x_t: Tensor, _t: Tensor, _early: bool) -> Callable[[Tensor], None]:
    return lambda _answer: None
