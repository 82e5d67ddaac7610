"""What a method's steps really cost: network calls by role, counted while they run, by what flows back through them.

A call is one pass through a network as a role, counted in samples: a guided pair that goes through in one batch of 2B
is two. What flows back is seen when it does: by a hook on what the pass gave, and one on every parameter of the role.
Blocks that a checkpoint runs again in the backward pass belong to the call that they repeat.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fewstep.data.batch import Batch
from fewstep.training.method import Method, Order, Turn


@dataclass(frozen=True)
class Calls:
    """Forward passes of one role in one step, counted per sample of the batch, by what flows back through them.

    Attributes:
        no_grad: nothing.
        to_parameters: the gradient of the role's own parameters.
        to_inputs: only the gradient of the sample; the role's parameters get none.
        jvp: nothing; passes that carry a tangent (forward-mode derivative), which are no part of the others.
        jvp_to_parameters: as ``to_parameters``, from the answer of a pass that carries a tangent, too.
    """

    no_grad: float = 0
    to_parameters: float = 0
    to_inputs: float = 0
    jvp: float = 0
    jvp_to_parameters: float = 0


@dataclass(eq=False)
class _Pass:
    """One call of a network: how many rows it had, and in which backward passes something flowed through it.

    ``early``: it ended at a tap.
    """

    role: str
    rows: int
    tangent: bool
    early: bool
    graph: bool = False
    backwards: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.role}/features" if self.early else self.role


class CallCounter:
    """Counts network calls while it is open; what is counted can be read then and after.

    >>> with CallCounter(method) as counter:
    ...     loop.run()
    >>> counter.calls(7)
    {'student': Calls(no_grad=2.0, ...), 'critic': Calls(..., to_parameters=1.0, ...)}

    Args:
        method: its ``turns`` are the steps; calls that are made between them (sample grids) belong to the step None.
        beside: other networks that are watched, text encoders above all, by name.
    """

    def __init__(self, method: Method, beside: Mapping[str, nn.Module] | None = None) -> None:
        self.method, self.beside = method, dict(beside or {})
        #: The steps whose batch was to be logged: they may cost more than others.
        self.logged: set[int] = set()
        self._passes: defaultdict[int | None, list[_Pass]] = defaultdict(list)
        self._samples: Counter[int] = Counter()
        self._updates: defaultdict[str, set[int]] = defaultdict(set)
        self._beside: Counter[tuple[int | None, str]] = Counter()
        self._step: int | None = None
        self._open = ExitStack()

    def __enter__(self) -> CallCounter:
        with ExitStack() as stack:
            _replace(stack, self.method, "turns", partial(self._turns, self.method.turns))
            for name, role in self.method.roles.items():
                for denoiser in (expert.denoiser for expert in role.experts.values()):
                    _replace(stack, denoiser, "on_call", partial(self._call, name))
                for parameter in role.parameters():
                    stack.callback(parameter.register_hook(partial(self._reached, name)).remove)
            for name, module in self.beside.items():
                stack.callback(module.register_forward_pre_hook(partial(self._called, name)).remove)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    # --- what was counted ---------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """The steps that were played, in order."""
        return sorted(self._samples)

    def calls(self, step: int) -> dict[str, Calls]:
        """What a step cost, per sample, by role; nothing that is zero."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for one in self._passes[step]:
            found[one.name][self._kind(one)] += one.rows
        samples = self._samples[step]
        return {name: Calls(**{kind: rows / samples for kind, rows in rows.items()}) for name, rows in found.items()}

    def backwards(self, step: int) -> dict[str, float]:
        """How often something flowed back through a role's calls, per sample."""
        rows: Counter[str] = Counter()
        for one in self._passes[step]:
            rows[one.name] += one.rows * len(one.backwards)
        return {name: count / self._samples[step] for name, count in rows.items() if count}

    def wasted(self, step: int) -> dict[str, float]:
        """Calls that built a graph which nothing flowed back through, per sample: they should have built none."""
        rows: Counter[str] = Counter()
        for one in self._passes[step]:
            rows[one.name] += one.rows * (one.graph and not one.backwards)
        return {name: count / self._samples[step] for name, count in rows.items() if count}

    def beside_calls(self, step: int | None) -> dict[str, int]:
        """How often each network of ``beside`` was called in a step, whatever its batch."""
        return {name: self._beside[step, name] for name in self.beside}

    def outside(self) -> dict[str, int]:
        """Rows that went through each role between steps."""
        rows: Counter[str] = Counter()
        for one in self._passes[None]:
            rows[one.name] += one.rows
        return dict(rows)

    def _kind(self, one: _Pass) -> str:
        if not one.backwards:
            return "jvp" if one.tangent else "no_grad"
        if not self._updates[one.role].intersection(one.backwards):
            return "to_inputs"
        return "jvp_to_parameters" if one.tangent else "to_parameters"

    # --- where it is counted ------------------------------------------------------------------------------------

    def _turns(self, turns: Any, step: int, batch: Batch) -> Iterator[Turn | Order]:
        self._samples[step] += batch.size
        if batch.logging:
            self.logged.add(step)
        generator = turns(step, batch)
        while True:
            self._step = step
            try:
                turn = next(generator)
            except StopIteration:
                return
            finally:
                self._step = None
            yield turn

    def _call(self, role: str, x_t: Tensor, t: Tensor, early: bool) -> Callable[[Tensor], None]:
        one = _Pass(role, len(x_t), tangent=_has_tangent(x_t) or _has_tangent(t), early=early)
        self._passes[self._step].append(one)
        return partial(_watch, one)

    def _reached(self, role: str, _gradient: Tensor) -> None:
        self._updates[role].add(_backward_pass())

    def _called(self, name: str, _module: nn.Module, _arguments: Any) -> None:
        self._beside[self._step, name] += 1


def forward_passes(calls: Mapping[str, Calls], feature_share: float = 1.0) -> float:
    """The cost of calls in forward passes of one sample.

    A backward pass costs two forward passes, one where it only goes to the inputs; a tangent costs one. With adapters
    the way to the parameters is nearly as cheap as that to the inputs.

    Args:
        calls: by role.
        feature_share: how much of the network runs until a GAN head's tap.
    """
    total = 0.0
    for name, one in calls.items():
        passes = one.no_grad + 3 * one.to_parameters + 2 * one.to_inputs + 2 * one.jvp + 4 * one.jvp_to_parameters
        total += passes * (feature_share if name.endswith("/features") else 1.0)
    return total


def _watch(one: _Pass, output: Tensor) -> None:
    if output.requires_grad:
        one.graph = True
        output.register_hook(lambda _gradient: _note(one))


def _note(one: _Pass) -> None:
    if (number := _backward_pass()) not in one.backwards:
        one.backwards.append(number)


def _backward_pass() -> int:
    """The number of the backward pass that runs now."""
    return torch._C._current_graph_task_id()


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object until the stack closes; what it takes from its class comes back by itself."""
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)
