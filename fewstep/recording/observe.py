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
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.recording.capture import capture, capture_changes, scrambled
from fewstep.recording.errors import RecordingError
from fewstep.recording.observation import NetworkCall, Observation, Stop, Stub
from fewstep.recording.pipeline import evaluating, find_decoder, find_scheduler, modules_of
from fewstep.recording.scheduler_watch import feed_times, watch_scheduler


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
    times: Tensor | None = None,
) -> Observation:
    """Call `pipeline(**arguments)` and watch.

    Args:
        steps: stop after so many `scheduler.step` calls; None: let the pipeline finish.
        before: name of a component; stop when it is called (its arguments are kept, it does not run).
        replace: (index of the step, the scheduler's next sample) -> what the pipeline is given instead.
        stub: components whose forward is not run, and what they return instead.
        stop_at_decode: stop when the decoder is called and keep what it is given.
        x0: also ask the scheduler for its own clean sample at every step, where it has one.
        set_up: called once with the scheduler's copy before the run.
        times: (N,) timesteps that the pipeline is led through instead of the scheduler's own, standing still; steps
            then hold nothing but their time and the names of what was called, and of the above only `stub` counts.

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
        if times is None:
            watch_scheduler(scheduler, seen, steps, replace, x0)
        else:
            feed_times(scheduler, seen, times)
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
        except Stop:
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
def _watched(
    component: str, module: nn.Module, seen: Observation, before: str | None, stub: Stub | None
) -> Iterator[None]:
    signature = inspect.signature(module.forward)
    stubbed = stub is not None and component in stub.components
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
            raise Stop

    def leave(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        running[-1].output = capture(output)
        if stubbed:
            seen.last_output = running[-1].output
        running.pop()

    hooks = [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
    ]
    own_forward = module.__dict__.get("forward")
    if stubbed:
        forward, noise = module.forward, torch.Generator().manual_seed(sum(map(ord, component)))

        @functools.wraps(forward)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if len(seen.steps) in stub.live:
                return forward(*args, **kwargs)
            output = seen.last_output if stub.output is None else stub.output
            return scrambled(output, noise) if stub.scramble else capture(output)

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
        raise Stop

    decoder.decode = decode
    try:
        yield
    finally:
        if own_decode is None:
            del decoder.__dict__["decode"]
        else:
            decoder.decode = own_decode
