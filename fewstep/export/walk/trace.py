"""Running a stock pipeline and seeing what passes between it and its scheduler.

The scheduler is told a known x0 in the network's own words instead of the network's answer. So the trace shows what the
scheduler makes of an x0 whatever the weights are: a fresh network whose output is zero would hide a wrong table.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.recording.pipeline import evaluating, find_scheduler, modules_of, with_parts
from fewstep.recording.watch.hooks import hooked, method_replaced
from fewstep.recording.watch.scheduler import sample_scaled, watch_scaling
from fewstep.recording.watch.token_times import velocity_sign

#: (network input, timestep, the network's answer) -> what the scheduler is given as ``model_output``.
Tell = Callable[[Tensor, float, Tensor], Tensor]


@dataclass(frozen=True)
class Draw:
    """Normal numbers that were drawn, and whether the call's own generator gave them (else the global one did)."""

    value: Tensor
    own_generator: bool


@dataclass
class TracedStep:
    """One ``scheduler.step``.

    Attributes:
        called: names of the pipeline's networks that were called since the step before.
        timestep: the number that the pipeline passes.
        passed: all arguments of the step but the model output and the sample, as they were passed.
        sample: the scheduler's sample, (B, ...).
        scaled: whether the pipeline called ``scale_model_input``.
        network_input: the sample after that.
        answer: what the pipeline made of the network's output, in the scheduler's usual sense.
        told: what the scheduler was given in its place.
        draws: the normal numbers drawn inside the step.
        result: the next sample.
    """

    called: frozenset[str]
    timestep: float
    passed: dict[str, Any]
    sample: Tensor
    scaled: bool
    network_input: Tensor
    answer: Tensor
    told: Tensor
    draws: list[Draw]
    result: Tensor


@dataclass
class Trace:
    """A run: what the pipeline asked ``set_timesteps`` for, what it got, and what followed.

    Attributes:
        steps: in their order.
        initial_draws: the numbers drawn before the first step.
        asked: the arguments of ``set_timesteps``.
        timesteps: what it made of them.
    """

    steps: list[TracedStep] = field(default_factory=list)
    initial_draws: list[Draw] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] = ()


# Of what a pipeline draws from the global random state before its loop: as a recording's conditioning was drawn.
_TOLD_SEED = 0
# From the first step on, nobody's: under that of the call's generator a scheduler redraws the initial noise, and fresh
# noise would look like an ODE.
_STEP_SEED = 1_618_033_988


class _Finished(BaseException):
    """Ends a run when all steps are seen. Not an Exception, so that no pipeline catches it."""


class _DrawWatch:
    """Keeps the normal numbers that are drawn while it is on.

    Pipelines and schedulers ask torch's own module for them, by name. A mode of torch's would see every operation, and
    take longer than most of those of a walk do.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator
        self._open = contextlib.ExitStack()
        self.draws: list[Draw] = []

    def __enter__(self) -> None:
        for draw in (torch.randn, torch.randn_like):
            self._open.enter_context(method_replaced(torch, draw.__name__, self._kept(draw)))

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _kept(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(draw)
        def kept(*args: Any, **kwargs: Any) -> Tensor:
            result = draw(*args, **kwargs)
            self.draws.append(Draw(result.detach().clone(), kwargs.get("generator") is self._generator))
            return result

        return kept

    def take(self) -> list[Draw]:
        """The draws since the last call."""
        taken, self.draws = self.draws, []
        return taken


def trace(pipeline: Any, arguments: dict[str, Any], tell: Tell | None) -> Trace:
    """Run ``pipeline(**arguments)`` up to its last ``scheduler.step`` and keep what was seen.

    The pipeline is left as it was and so is the global random state. What the pipeline itself raises passes through.

    Args:
        pipeline: its own scheduler decides what happens; a copy of it is used.
        arguments: of the call, ``generator`` among them where the pipeline takes one.
        tell: what the scheduler is told; None: stop at ``set_timesteps``.
    """
    name = find_scheduler(pipeline)
    scheduler = _copied(getattr(pipeline, name))
    run = with_parts(pipeline, **{name: scheduler})
    run.set_progress_bar_config(disable=True)
    watch = _DrawWatch(arguments.get("generator"))
    seen = Trace()
    _watch_set_timesteps(scheduler, seen, stop=tell is None)
    called: list[str] = []
    if tell is not None:
        _watch_steps(scheduler, seen, watch, tell, called)
    with (
        _trial(),
        torch.no_grad(),
        evaluating(*modules_of(run).values()),
        _noting(run, called),
        watch,
        contextlib.suppress(_Finished),
    ):
        run(**arguments)
    return seen


def replay(pipeline: Any, seen: Trace, tell: Tell) -> Trace:
    """The same steps by the scheduler alone, in float32, because a half-precision run hides a wrong table entry.

    The scheduler gets the arguments that the pipeline passed; the answers in the result are the told ones.
    """
    scheduler = _copied(getattr(pipeline, find_scheduler(pipeline)))
    watch = _DrawWatch(None)
    again = Trace(asked=seen.asked)
    with _trial(), torch.no_grad(), watch:
        torch.manual_seed(_STEP_SEED)
        scheduler.set_timesteps(**seen.asked)
        sample = seen.steps[0].sample.float()
        for step in seen.steps:
            scaled = scheduler.scale_model_input(sample, step.passed["timestep"]) if step.scaled else sample
            told = tell(scaled, step.timestep, scaled)
            sign = velocity_sign(scheduler, {"sample": sample, **step.passed})
            watch.take()
            following = scheduler.step(model_output=told if sign > 0 else -told, sample=sample, **step.passed)
            following = following if isinstance(following, Tensor) else following[0]
            again.steps.append(
                replace(
                    step,
                    sample=sample,
                    network_input=scaled,
                    answer=told,
                    told=told,
                    draws=watch.take(),
                    result=following,
                )
            )
            sample = following
    return again


def _copied(scheduler: Any) -> Any:
    """A copy with the same configuration, which is never changed, only replaced, and may hold a thousand numbers."""
    config = getattr(scheduler, "_internal_dict", None)
    return copy.deepcopy(scheduler, {id(config): config})


def _watch_set_timesteps(scheduler: Any, seen: Trace, *, stop: bool) -> None:
    original = scheduler.set_timesteps
    signature = inspect.signature(original)

    # functools.wraps keeps the signature visible: pipelines look whether it takes sigmas or timesteps.
    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        seen.asked = dict(signature.bind(*args, **kwargs).arguments)
        seen.timesteps = tuple(float(timestep) for timestep in scheduler.timesteps)
        if stop:
            raise _Finished

    scheduler.set_timesteps = set_timesteps


def _watch_steps(scheduler: Any, seen: Trace, watch: _DrawWatch, tell: Tell, called: list[str]) -> None:
    original = scheduler.step
    scaled: list[Tensor] = []
    signature = inspect.signature(original)

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        answer, timestep, sample = (bound.arguments[key] for key in ("model_output", "timestep", "sample"))
        before = watch.take()
        if not seen.steps:
            seen.initial_draws = before
        # Cloned at once: some pipelines write the next sample into the same storage.
        kept = sample.detach().clone()
        own = sample_scaled(scaled, kept)
        network_input = kept if own is None else own
        scaled.clear()
        passed = {key: value for key, value in bound.arguments.items() if key not in ("model_output", "sample")}
        if not seen.steps:
            torch.manual_seed(_STEP_SEED)  # within the fork of a trial
        sign = velocity_sign(scheduler, bound.arguments)
        answer = answer if sign > 0 else -answer
        told = tell(network_input, float(timestep), answer)
        watch.take()  # what is told may be drawn too
        bound.arguments["model_output"] = told if sign > 0 else -told
        result = original(*bound.args, **bound.kwargs)
        following = result if isinstance(result, Tensor) else result[0]
        seen.steps.append(
            TracedStep(
                called=frozenset(called),
                timestep=float(timestep),
                passed=passed,
                sample=kept,
                scaled=own is not None,
                network_input=network_input,
                answer=answer.detach().clone(),
                told=told,
                draws=watch.take(),
                result=following.detach().clone(),
            )
        )
        called.clear()
        if len(seen.steps) == len(scheduler.timesteps):
            raise _Finished
        return result

    scheduler.step = step
    watch_scaling(scheduler, lambda result: scaled.append(result.detach().clone()))


@contextlib.contextmanager
def _trial() -> Iterator[None]:
    """Leave the global random state as it was, use one inside that does not depend on it, and keep quiet.

    A trial may fail with warnings; what it means for the user stands in the plan.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(_TOLD_SEED)
        yield


def _noting(pipeline: Any, called: list[str]) -> contextlib.AbstractContextManager[None]:
    """Append the name of every network that is called."""

    def note(name: str, *_: Any) -> None:
        called.append(name)

    return hooked(modules_of(pipeline), before=note)
