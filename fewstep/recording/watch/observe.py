"""Running a pipeline's own `__call__` under observation: what its network gets and gives, what its scheduler is told.

The pipeline is left exactly as found. It runs with a copy of its scheduler, its attributes are put back afterwards,
hooks are removed in `finally`, the global random state is restored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import one_line
from fewstep.recording.call.pictures import advice
from fewstep.recording.errors import RecordingError
from fewstep.recording.pipeline import evaluating, find_decoder, find_scheduler, modules_of
from fewstep.recording.watch.capture import capture, capture_changes, scrambled, tensors_in
from fewstep.recording.watch.cut_texts import quiet_about_cuts
from fewstep.recording.watch.finite import refuse_unfinite_conditioning, refuse_unfinite_step
from fewstep.recording.watch.forgetting import forgotten
from fewstep.recording.watch.hooks import hooked, method_replaced
from fewstep.recording.watch.observation import NetworkCall, Observation, Step, Stop, Stub
from fewstep.recording.watch.scheduler import feed_times, unwatch_scheduler, watch_scheduler


def observe(
    pipeline: Any,
    arguments: dict[str, Any],
    *,
    steps: int | None = None,
    before: str | None = None,
    skip: int = 0,
    replace: Callable[[int, Tensor], Tensor] | None = None,
    stub: Stub | None = None,
    stop_at_decode: bool = False,
    decoder_input: Tensor | None = None,
    x0: bool = False,
    set_up: Callable[[Any], None] | None = None,
    seed: int | None = None,
    loop: Collection[str] | None = None,
) -> Observation:
    """Call `pipeline(**arguments)` and watch.

    Args:
        pipeline: a diffusers pipeline.
        arguments: of its call.
        steps: stop after so many `scheduler.step` calls; None: let the pipeline finish.
        before: name of a component; stop when it is called (its arguments are kept, it does not run).
        skip: so many calls of it go before that.
        replace: (index of the step, the scheduler's next sample) -> what the pipeline is given instead.
        stub: components whose forward is not run, and what they return instead.
        stop_at_decode: stop when the decoder is called and keep what it is given.
        decoder_input: what the decoder is given in the place of what the pipeline gives it.
        x0: also ask the scheduler for its own clean sample at every step, where it has one.
        set_up: called once with the scheduler's copy before the run.
        seed: of the global random state during the run; None leaves that as it is.
        loop: the components that the pipeline's loop calls, where they are known: nothing else is kept of calls. None:
            what the first step alone calls is forgotten in the second.

    Raises:
        RecordingError: the pipeline itself failed, or what it computes is not finite; the message carries its words.
    """
    seen = Observation()
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(_left_as_found(pipeline))
        if seed is not None:
            torch.manual_seed(seed)  # within the fork, so that the caller's state stays what it was
        if set_up is not None:
            set_up(scheduler)
        check = partial(refuse_unfinite_step, pipeline, result=stub is None)
        watch_scheduler(scheduler, seen, steps, replace, x0, check)
        for component, module in modules_of(pipeline).items():
            kept = loop is None or component in loop
            stack.enter_context(_watched(component, module, seen, before, stub, skip, kept))
        decoder = find_decoder(pipeline)
        if decoder is not None and stop_at_decode:
            stack.enter_context(_decode_caught(getattr(pipeline, decoder), seen))
        elif decoder is not None and decoder_input is not None:
            stack.enter_context(_decode_given(getattr(pipeline, decoder), decoder_input))
        _run(pipeline, arguments, seen)
    if before is not None and seen.pending:
        refuse_unfinite_conditioning(pipeline, seen.pending, arguments)
    return seen


def lead(pipeline: Any, arguments: dict[str, Any], times: Tensor, stub: Stub) -> list[Step]:
    """Call `pipeline(**arguments)` and lead it through times of our choice, its sample standing still.

    Args:
        pipeline: a diffusers pipeline.
        arguments: of its call, with as many steps as there are times.
        times: (N,) timesteps in the place of the scheduler's own, in any order.
        stub: what stands in for the networks.

    Returns:
        N steps that hold their time and the names of what was called, nothing else.

    Raises:
        RecordingError: as :func:`observe`.
    """
    seen = Observation()
    with contextlib.ExitStack() as stack:
        feed_times(stack.enter_context(_left_as_found(pipeline)), seen, times)
        for component, module in modules_of(pipeline).items():
            stack.enter_context(_watched(component, module, seen, None, stub))
        _run(pipeline, arguments, seen)
    return seen.steps


def _run(pipeline: Any, arguments: dict[str, Any], seen: Observation) -> None:
    """Call the pipeline until it ends or is stopped; its failure is a RecordingError."""
    try:
        seen.result = pipeline(**arguments)
    except Stop:
        pass
    except RecordingError:
        raise
    except Exception as error:
        said = one_line(error)[:300].rstrip(".")
        raise RecordingError(
            f"{type(pipeline).__name__} failed under the recorder: {type(error).__name__}: {said}; "
            f"{advice(pipeline, arguments, error)}"
        ) from error


@contextlib.contextmanager
def _left_as_found(pipeline: Any) -> Iterator[Any]:
    """Give the pipeline a copy of its scheduler, without gradients, and yield the copy.

    Afterwards its attributes, its networks' train and eval modes, its decoder's weights and the global random state are
    what they were.
    """
    attributes = dict(pipeline.__dict__)
    decoder = find_decoder(pipeline)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(evaluating(*modules_of(pipeline).values()))
        stack.enter_context(quiet_about_cuts(pipeline))
        stack.callback(pipeline.__dict__.update, attributes)
        stack.callback(pipeline.__dict__.clear)
        pipeline.set_progress_bar_config(disable=True)
        name = find_scheduler(pipeline)
        scheduler = copy.deepcopy(getattr(pipeline, name))
        # Written past __setattr__, which would rewrite the pipeline's config.
        pipeline.__dict__[name] = scheduler
        stack.callback(unwatch_scheduler, scheduler)
        if decoder is not None:
            stack.enter_context(_weights_kept(getattr(pipeline, decoder)))
        stack.enter_context(torch.no_grad())
        yield scheduler


@contextlib.contextmanager
def _watched(
    component: str,
    module: nn.Module,
    seen: Observation,
    before: str | None,
    stub: Stub | None,
    skip: int = 0,
    kept: bool = True,
) -> Iterator[None]:
    """Note the calls of a component in `seen`, and what it was told and said where that is kept.

    Where it is stubbed it is not run.
    """
    signature = inspect.signature(module.forward)
    stubbed = stub is not None and component in stub.components
    beside = stub is not None and component in dict(stub.beside)
    running: list[NetworkCall] = []
    previous: dict[str, Any] = {}
    answered: dict[str, Any] = {}

    def enter(_name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items() if kept else ():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        answers = [tensor for call in seen.pending for tensor in tensors_in(call.output)]
        told = capture_changes(arguments, previous, answers) if kept else {}
        running.append(NetworkCall(component, told, earlier=tuple(seen.pending)))
        previous.update(told)
        seen.pending.append(running[-1])
        if component == before and sum(call.component == before for call in seen.pending) > skip:
            raise Stop

    def leave(_name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        call = running.pop()
        if not kept:
            forgotten(call, output)
            return
        # The same in each step in which it is stubbed.
        answered.update(capture_changes({"": output}, answered))
        call.output = answered[""]
        if stubbed:
            seen.last_output = call.output

    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked({component: module}, before=enter, after=leave))
        if stub is not None and (stubbed or beside):
            stand_in = _stand_in(component, module.forward, stub, seen)
            stack.enter_context(method_replaced(module, "forward", stand_in))
        yield


def _stand_in(component: str, forward: Callable[..., Any], stub: Stub, seen: Observation) -> Callable[..., Any]:
    """What is called in the place of a stubbed component's forward."""
    noise = torch.Generator().manual_seed(sum(map(ord, component)))
    beside = dict(stub.beside)

    @functools.wraps(forward)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if len(seen.steps) in stub.live:
            return forward(*args, **kwargs)
        if component in beside:
            return capture(beside[component])
        output = seen.last_output if stub.output is None else stub.output
        return scrambled(output, noise) if stub.scramble else capture(output)

    return stand_in


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


def _decode_caught(decoder: nn.Module, seen: Observation) -> contextlib.AbstractContextManager[None]:
    """Inside, the decoder's `decode` notes what it is given, and ends the run."""

    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.decoder_input = capture(z)
        raise Stop

    return method_replaced(decoder, "decode", decode)


def _decode_given(decoder: nn.Module, given: Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, the decoder decodes what is given here."""
    own: Any = decoder.decode

    # functools.wraps keeps the signature visible.
    @functools.wraps(own)
    def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(given.to(z), *args, **kwargs)

    return method_replaced(decoder, "decode", decode)
