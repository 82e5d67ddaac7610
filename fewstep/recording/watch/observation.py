"""What a run under observation showed: calls of networks, steps of the scheduler, and what stood in for a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class NetworkCall:
    """One call of a pipeline component: its bound keyword arguments and what it returned (cloned).

    `earlier`: the calls of the same step that came before it; `finite`: whether its answer was, of a call that was
    forgotten.
    """

    component: str
    arguments: dict[str, Any]
    output: Any = None
    earlier: tuple[NetworkCall, ...] = field(default=(), repr=False)
    finite: bool = True


@dataclass
class Step:
    """One `scheduler.step`: the network calls since the previous one, and what the scheduler was given and returned.

    `integer`: the scheduler counts its timesteps in integers; `scaled`: the last `scale_model_input`, None
    where that was not called; `result`: the next sample, None where the pipeline was given another one; `sigma`: its
    entry of `sigmas` for this step; `x0`: its clean sample, where asked for.
    """

    calls: list[NetworkCall]
    model_output: Tensor
    timestep: float
    integer: bool
    sample: Tensor
    scaled: Tensor | None
    result: Tensor | None = None
    x0: Tensor | None = None
    sigma: float | None = None

    @property
    def network_input(self) -> Tensor:
        """The sample as the network is given it: after `scale_model_input` where the pipeline calls that."""
        return self.sample if self.scaled is None else self.scaled


@dataclass(frozen=True)
class Stub:
    """Stands in for the forward of `components`: it returns `output`, except in the steps of `live`, which run as ever.

    Without an `output`, what one of them returned last is returned again; the first step must then be live. With
    `scramble` it is noise about 1 of that form, other noise at every call. Each component of `beside`, which the
    pipeline calls beside these, returns what stands there with its name.
    """

    components: tuple[str, ...]
    output: Any = None
    live: frozenset[int] = frozenset()
    scramble: bool = False
    beside: tuple[tuple[str, Any], ...] = ()


@dataclass
class Observation:
    """What one run showed.

    `pending`: the calls that no `scheduler.step` followed; `last_output`: what a stubbed component returned last;
    `result`: the pipeline's output; `timesteps`: the scheduler's, all that it set for this run, at the first step.
    """

    steps: list[Step] = field(default_factory=list)
    timesteps: Tensor | None = None
    pending: list[NetworkCall] = field(default_factory=list)
    last_output: Any = None
    decoder_input: Tensor | None = None
    result: Any = None


class Stop(BaseException):
    """Ends a run early. Not an Exception, so that no pipeline catches it."""
