"""Running a pipeline's own `__call__` under observation: what its network gets and gives, what its scheduler is told.

The pipeline is left exactly as found. It runs with a copy of its scheduler, its attributes are put back afterwards,
hooks are removed in `finally`, the global random state is restored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.recording.capture import capture, capture_changes
from fewstep.recording.errors import RecordingError


@dataclass
class NetworkCall:
    """One call of a pipeline component: its bound keyword arguments and what it returned (cloned)."""

    component: str
    arguments: dict[str, Any]
    output: Any = None


@dataclass
class Step:
    """One `scheduler.step`: the network calls since the previous one, and what the scheduler was given and returned.

    `integer`: the scheduler counts its timesteps in integers; `scaled`: the last `scale_model_input`, None
    where that was not called; `sigma`: its entry of `sigmas` for this step; `x0`: its clean sample, where asked for.
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
    """Stands in for a component's forward: it returns `output`, except in the steps of `live`, which run as ever."""

    component: str
    output: Any
    live: frozenset[int] = frozenset()


@dataclass
class Observation:
    """What one run showed. `pending`: the calls that no `scheduler.step` followed; `result`: the pipeline's output."""

    steps: list[Step] = field(default_factory=list)
    pending: list[NetworkCall] = field(default_factory=list)
    decoder_input: Tensor | None = None
    result: Any = None


class _Stop(BaseException):
    """Ends a run early. Not an Exception, so that no pipeline catches it."""


def find_scheduler(pipeline: Any) -> str:
    """The name of the pipeline's scheduler component."""
    found = [n for n, c in pipeline.components.items() if hasattr(c, "step") and hasattr(c, "set_timesteps")]
    if not found:
        raise RecordingError(f"{type(pipeline).__name__} has no scheduler with step and set_timesteps to record")
    return "scheduler" if "scheduler" in found else found[0]


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """The pipeline's components that are networks, by name."""
    return {name: c for name, c in pipeline.components.items() if isinstance(c, nn.Module)}


def find_decoder(pipeline: Any) -> str | None:
    """The name of the component that turns latents into images (it has `encode` and `decode`); None: there is none."""
    for name, module in modules_of(pipeline).items():
        if callable(getattr(module, "encode", None)) and callable(getattr(module, "decode", None)):
            return name
    return None


def observe(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    steps: int | None = None,
    before: str | None = None,
    replace: Callable[[int, Tensor], Tensor] | None = None,
    stub: Stub | None = None,
    stop_at_decode: bool = False,
    x0: bool = False,
    set_up: Callable[[Any], None] | None = None,
) -> Observation:
    """Call `pipeline(**arguments)` and watch.

    Args:
        steps: stop after so many `scheduler.step` calls; None: let the pipeline finish.
        before: name of a component; stop when it is called (its arguments are kept, it does not run).
        replace: (index of the step, the scheduler's next sample) -> what the pipeline is given instead.
        stub: a component whose forward is not run, and what it returns instead.
        stop_at_decode: stop when the decoder is called and keep what it is given.
        x0: also ask the scheduler for its own clean sample at every step, where it has one.
        set_up: called once with the scheduler's copy before the run.

    Raises:
        RecordingError: the pipeline itself failed; the message carries its words.
    """
    seen = Observation()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept(pipeline))
        pipeline.set_progress_bar_config(disable=True)
        name = find_scheduler(pipeline)
        scheduler = copy.deepcopy(getattr(pipeline, name))
        # Written past __setattr__, which would rewrite the pipeline's config.
        pipeline.__dict__[name] = scheduler
        if set_up is not None:
            set_up(scheduler)
        _watch_scheduler(scheduler, seen, steps, replace, x0)
        for component, module in modules_of(pipeline).items():
            stack.enter_context(_watched(component, module, seen, before, stub))
        decoder = find_decoder(pipeline)
        if decoder is not None:
            stack.enter_context(_weights_kept(getattr(pipeline, decoder)))
        if decoder is not None and stop_at_decode:
            stack.enter_context(_decode_caught(getattr(pipeline, decoder), seen))
        stack.enter_context(torch.no_grad())
        try:
            seen.result = pipeline(**arguments)
        except _Stop:
            pass
        except RecordingError:
            raise
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            hint = ""
            if any("image" in key and key not in arguments for key in inspect.signature(pipeline.__call__).parameters):
                hint = " (a pipeline that needs an image, a mask or a control cannot be distilled yet)"
            raise RecordingError(
                f"{type(pipeline).__name__} failed under the recorder: {type(error).__name__}: {text[:300]}{hint}; "
                "check the arguments of the call"
            ) from error
    return seen


@contextlib.contextmanager
def _kept(pipeline: Any) -> Iterator[None]:
    """Put back the pipeline's attributes, its networks' train/eval modes and the global random state."""
    attributes = dict(pipeline.__dict__)
    with torch.random.fork_rng(), evaluating(*modules_of(pipeline).values()):
        try:
            yield
        finally:
            pipeline.__dict__.clear()
            pipeline.__dict__.update(attributes)


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """The networks in eval mode: in train mode a label embedding drops labels at random, which no recipe reproduces."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _watch_scheduler(
    scheduler: Any, seen: Observation, steps: int | None, replace: Callable[[int, Tensor], Tensor] | None, x0: bool
) -> None:
    original_step, scaled = scheduler.step, []
    signature = inspect.signature(original_step)

    # functools.wraps keeps the signature visible: pipelines inspect it to decide whether to pass eta and generator.
    @functools.wraps(original_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        values = list(bound.values())
        model_output, timestep, sample = (
            bound.get(key, values[i]) for i, key in enumerate(("model_output", "timestep", "sample"))
        )
        record = Step(
            calls=list(seen.pending),
            model_output=capture(model_output),
            timestep=float(timestep),
            integer=not (timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, float)),
            sample=capture(sample),
            scaled=scaled[-1] if scaled else None,
        )
        seen.pending.clear()
        scaled.clear()
        seen.steps.append(record)
        if x0:
            record.x0 = _own_x0(scheduler, bound)
        result = original_step(*args, **kwargs)
        record.result, record.sigma = _next_sample(result), _sigma(scheduler)
        if x0 and record.x0 is None and _ends_clean(scheduler, len(seen.steps)):
            record.x0 = record.result
        if steps is not None and len(seen.steps) >= steps:
            raise _Stop
        if replace is not None:
            result = _with_sample(result, replace(len(seen.steps) - 1, record.result))
        return result

    scheduler.step = step
    if hasattr(scheduler, "scale_model_input"):
        original_scale = scheduler.scale_model_input

        @functools.wraps(original_scale)
        def scale_model_input(*args: Any, **kwargs: Any) -> Any:
            result = original_scale(*args, **kwargs)
            scaled.append(capture(result))
            return result

        scheduler.scale_model_input = scale_model_input


@contextlib.contextmanager
def _watched(
    component: str, module: nn.Module, seen: Observation, before: str | None, stub: Stub | None
) -> Iterator[None]:
    signature = inspect.signature(module.forward)
    running: list[NetworkCall] = []
    previous: dict[str, Any] = {}

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        running.append(NetworkCall(component, capture_changes(arguments, previous)))
        previous.update(running[-1].arguments)
        seen.pending.append(running[-1])
        if component == before:
            raise _Stop

    def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        running.pop().output = capture(output)

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]
    stubbed = stub is not None and stub.component == component
    own_forward = module.__dict__.get("forward")
    if stubbed:
        forward = module.forward

        @functools.wraps(forward)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if len(seen.steps) in stub.live else capture(stub.output)

        module.forward = stand_in
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if stubbed and own_forward is None:
            del module.__dict__["forward"]
        elif stubbed:
            module.forward = own_forward


@contextlib.contextmanager
def _weights_kept(decoder: nn.Module) -> Iterator[None]:
    """Put back a decoder's own weights: pipelines cast them to float32 for a decode that may never end here."""
    weights = [(parameter, parameter.data) for parameter in decoder.parameters()]
    buffers = [(m, name, b) for m in decoder.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


@contextlib.contextmanager
def _decode_caught(decoder: nn.Module, seen: Observation) -> Iterator[None]:
    own_decode = decoder.__dict__.get("decode")

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.decoder_input = capture(z)
        raise _Stop

    decoder.decode = decode
    try:
        yield
    finally:
        if own_decode is None:
            del decoder.__dict__["decode"]
        else:
            decoder.decode = own_decode


def _next_sample(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return capture(result)
    return capture(result[0] if isinstance(result, tuple) else result.prev_sample)


def _own_x0(scheduler: Any, bound: dict[str, Any]) -> Tensor | None:
    """The clean sample that the scheduler itself makes of this step; a twin takes the step, so that no state moves."""
    twin = copy.deepcopy(scheduler)
    result = type(scheduler).step(twin, **{**bound, "return_dict": True})
    return capture(getattr(result, "pred_original_sample", None))


def _sigma(scheduler: Any) -> float | None:
    """The noise level of the step just taken."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    return None if sigmas is None or index is None else float(sigmas[index - 1])


def _ends_clean(scheduler: Any, done: int) -> bool:
    """Whether this step was the last one and led to no noise, so that its result is the clean sample."""
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas is not None and float(sigmas[-1]) == 0 and done == len(scheduler.timesteps)


def _with_sample(result: Any, sample: Tensor) -> Any:
    if isinstance(result, Tensor):
        return sample
    if isinstance(result, tuple):
        return (sample, *result[1:])
    changed = copy.copy(result)
    changed.prev_sample = sample
    return changed
