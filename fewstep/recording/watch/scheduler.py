"""Watching a scheduler's copy: every step that a pipeline takes with it, and what its networks were asked before."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fewstep.recording.watch.capture import capture, capture_unless
from fewstep.recording.watch.forgetting import forget_encoders
from fewstep.recording.watch.observation import NetworkCall, Observation, Step, Stop
from fewstep.recording.watch.token_times import velocity_sign


def watch_scheduler(
    scheduler: Any,
    seen: Observation,
    steps: int | None,
    replace: Callable[[int, Tensor], Tensor] | None,
    x0: bool,
    check: Callable[[Step], None],
) -> None:
    """Note every step of `scheduler` in `seen`, and `check` it; the other arguments are those of `observe`."""
    original_step = scheduler.step
    scaled: list[Tensor] = []
    signature = inspect.signature(original_step)

    # functools.wraps keeps the signature visible: pipelines inspect it to decide whether to pass eta and generator.
    @functools.wraps(original_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        values = list(bound.values())
        model_output, timestep, sample = (
            bound.get(key, values[i]) for i, key in enumerate(("model_output", "timestep", "sample"))
        )
        sign = velocity_sign(scheduler, bound)
        model_output = without_variance(scheduler, model_output, sample)
        before = seen.steps[-1] if seen.steps else None
        sample = capture_unless(sample, *(() if before is None else (before.result,)))
        own = sample_scaled(scaled, sample)
        record = Step(
            calls=list(seen.pending),
            model_output=capture_unless(
                model_output if sign > 0 else -model_output, *(() if before is None else (before.model_output,))
            ),
            timestep=float(timestep),
            integer=not (timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, float)),
            sample=sample,
            scaled=None if own is None else capture_unless(own, sample),
        )
        seen.pending.clear()
        scaled.clear()
        if not seen.steps:
            seen.timesteps = capture(getattr(scheduler, "timesteps", None))
        elif len(seen.steps) == 1:
            forget_encoders(seen.steps[0], record)
        seen.steps.append(record)
        if x0:
            record.x0 = _own_x0(scheduler, bound)
        result = original_step(*args, **kwargs)
        record.result, record.sigma = _next_sample(result), _sigma(scheduler)
        if x0 and record.x0 is None and _ends_clean(scheduler, len(seen.steps)):
            record.x0 = record.result
        check(record)
        if steps is not None and len(seen.steps) >= steps:
            raise Stop
        if replace is not None:
            # A tensor of its own: some pipelines write what they pin into what their scheduler returned.
            result = _with_sample(result, replace(len(seen.steps) - 1, record.result).clone())
            record.result = None
        return result

    scheduler.step = step
    watch_scaling(scheduler, lambda result: scaled.append(capture(result)))


def unwatch_scheduler(scheduler: Any) -> None:
    """Give a scheduler's copy its own methods back.

    The others hold it and all that was seen: such a circle, of gigabytes, stays until garbage is collected.
    """
    for name in ("step", "scale_model_input", "set_timesteps"):
        vars(scheduler).pop(name, None)


def sample_scaled(scaled: Sequence[Any], sample: Tensor) -> Tensor | None:
    """The last of what ``scale_model_input`` gave in a step that may be its sample, for each answer; None: nothing.

    Some pipelines also scale a number with it, or a sample with a picture beside it (DeepFloyd IF's upscalers).
    """

    def fits(value: Any) -> bool:
        if isinstance(value, Tensor) and value.dim() == sample.dim():
            return value.shape[1:] == sample.shape[1:]
        return isinstance(value, Tensor) and value.dim() > 0 and value.numel() % sample.numel() == 0  # in another order

    return next((value for value in reversed(scaled) if fits(value)), None)


def without_variance(scheduler: Any, model_output: Tensor, sample: Tensor) -> Tensor:
    """A scheduler's ``model_output`` without the variance that it takes out of that itself (DeepFloyd IF)."""
    learned = getattr(scheduler, "config", {}).get("variance_type") in ("learned", "learned_range")
    doubled = model_output.shape[1:] == (2 * sample.shape[1], *sample.shape[2:])
    return model_output[:, : sample.shape[1]] if learned and doubled else model_output


def watch_scaling(scheduler: Any, seen: Callable[[Any], object]) -> None:
    """Tell ``seen`` what ``scale_model_input`` gives, where the scheduler has it; its signature stays."""
    if not hasattr(scheduler, "scale_model_input"):
        return
    scale = scheduler.scale_model_input

    @functools.wraps(scale)
    def scale_model_input(*args: Any, **kwargs: Any) -> Any:
        result = scale(*args, **kwargs)
        seen(result)
        return result

    scheduler.scale_model_input = scale_model_input


def feed_times(scheduler: Any, seen: Observation, times: Tensor) -> None:
    """Let the pipeline walk through `times` (N,), in this order, without moving: the sample stays what it is.

    Whatever the scheduler's own timesteps were, the pipeline meets these. Of each step only the time and the names of
    the called components are kept.
    """
    set_timesteps, signature = scheduler.set_timesteps, inspect.signature(scheduler.step)

    # functools.wraps keeps the signatures visible, as in `watch_scheduler`.
    @functools.wraps(set_timesteps)
    def set_fed_timesteps(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = times.to(scheduler.timesteps.device)

    @functools.wraps(scheduler.step)
    def stay(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        timestep, sample = float(bound["timestep"]), bound["sample"]
        calls = [NetworkCall(call.component, {}) for call in seen.pending]
        seen.pending.clear()
        nothing = sample.new_empty(0)
        seen.steps.append(Step(calls, nothing, timestep, not times.is_floating_point(), nothing, None))
        if len(seen.steps) == len(times):
            raise Stop
        return SchedulerOutput(prev_sample=sample) if bound.get("return_dict", True) else (sample,)

    scheduler.set_timesteps, scheduler.step = set_fed_timesteps, stay


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
