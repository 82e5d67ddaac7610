"""A role's network as a compiled graph (``torch.compile``), and as it is where a graph would be wrong.

The network itself stays uncompiled, and is what is hooked, averaged and exported. A compiled graph passes over hooks
that came later, and loses tangents: under ``forward_ad.dual_level`` its answer has none, which reads as a derivative of
zero. So a pass with hooks or a derivative runs the network itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import forward_ad

from fewstep.errors import one_line
from fewstep.recording.watch.hooks import any_hooked


def _silent(_line: str) -> None:
    """Tell nobody."""


class CompiledForms:
    """Gives the compiled form of each network that a role calls: its own, and a merged one where it has that.

    Args:
        role: its name.
        backend: of ``torch.compile``.
        say: told in one line when a network cannot be compiled and runs as it is from then on.
    """

    def __init__(
        self, role: str, backend: str | Callable[..., Any] = "inductor", say: Callable[[str], None] = _silent
    ) -> None:
        self.role, self.backend, self.say = role, backend, say
        self._forms: dict[int, CompiledNetwork] = {}

    def __call__(self, network: nn.Module) -> nn.Module:
        """The network as graphs."""
        form = self._forms.get(id(network))
        if form is None:
            form = self._forms[id(network)] = CompiledNetwork(network, self.role, self.backend, self._tell)
        return form

    def _tell(self, line: str) -> None:
        self.say(line)


class CompiledNetwork(nn.Module):
    """A network that runs as graphs: one for each shape, twice where it is also called without a gradient.

    From the second size of a dimension on, one graph serves all sizes of it.

    Args:
        network: of one role, or shared by several, which then have one of these each.
        role: its name; graphs are kept by role, so that no role's use up what torch allows another one.
        backend: of ``torch.compile``.
        say: told in one line when it cannot be compiled and runs as it is from then on.
    """

    def __init__(
        self,
        network: nn.Module,
        role: str,
        backend: str | Callable[..., Any],
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.network, self.role, self.say = network, role, say
        self._compiled = torch.compile(_code_of_its_own(network, role), backend=backend)
        self.failed = False

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the network returns."""
        if self.failed or any_hooked() or forward_ad._current_level >= 0:
            return self.network(*arguments, **named)
        try:
            return self._compiled(*arguments, **named)
        except TorchDynamoException as error:  # and what a backend raises, which is wrapped in one
            self.failed = True
            self.say(f"--compile: the {self.role}'s {type(self.network).__name__} stays uncompiled: {reason(error)}")
            return self.network(*arguments, **named)


def reason(error: BaseException) -> str:
    """Why something could not be compiled, in a part of a line."""
    return one_line(error)[:200]


def _code_of_its_own(network: nn.Module, role: str) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        return network(*arguments, **named)

    # Graphs hang on a function's code, which all closures of one definition share, and it holds eight of them.
    return types.FunctionType(
        run.__code__.replace(co_name=f"{role}_network"), run.__globals__, role, run.__defaults__, run.__closure__
    )
