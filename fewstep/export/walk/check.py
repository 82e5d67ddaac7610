"""The check at export: does the shipped scheduler mean by every step what the teacher's schedule means?

Timesteps that look right prove nothing: a swapped table, a shift applied twice or a clipped x0 runs and samples wrong.
So the exported pipeline is run stock, each step is told a known x0, and the next x_t must be the teacher's
alpha' * x0 + sigma' * n, with n the step's own noise (ODE), the noise just drawn (fresh) or both (TCD); the last x must
be x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.prediction import add_noise, expand, from_x0, noise_from_x0, ode_step, x0_map
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.strategic import Move, strategic_step, walk_end
from fewstep.diffusion.timesteps import descends
from fewstep.errors import one_line
from fewstep.export.errors import ExportError
from fewstep.export.walk.start import start_of
from fewstep.export.walk.trace import Trace, TracedStep, replay, trace
from fewstep.recording import Recipe
from fewstep.recording.pipeline import find_scheduler

# Relative to values of size one; float32 leaves 1e-6 here, one table entry amiss about 1e-3.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# The recipe against the pipeline: another batch, perhaps another kernel, of the same network.
_ANSWER_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class SchedulerCheckError(ExportError):
    """A scheduler that runs but does not do what the student was trained for; or it does not run."""


@dataclass(frozen=True)
class SchedulerCheck:
    """A walk that holds.

    Attributes:
        timesteps: what the pipeline passed to ``scheduler.step``.
        grid: the same as t in (0, 1], descending.
        initial_scale: the first x_t is this times unit noise.
        noise_follows: ``"generator"``, ``"global seed"``, or None where no noise is drawn between steps.
        deviation: the largest deviation met, in units of the tolerance (1 would be too much).
        traced: whether the first x_t also holds a trace of a picture.
    """

    timesteps: tuple[float, ...]
    grid: tuple[float, ...]
    initial_scale: float
    noise_follows: str | None
    deviation: float
    traced: bool = False


@dataclass(frozen=True)
class Reference:
    """The recipe's own call of a network, to compare the pipeline's with: is the network fed what training feeds it?

    Attributes:
        recipe: of the teacher.
        networks: by component; several where they share the time.
        conditioning: of one sample.
    """

    recipe: Recipe
    networks: dict[str, nn.Module]
    conditioning: Conditioning


def walk(
    pipeline: Any,
    arguments: dict[str, Any],
    schedule: NoiseSchedule,
    prediction_type: str,
    move: Move,
    component_at: Callable[[float], str],
    reference: Reference | None = None,
    pictured: bool = False,
) -> SchedulerCheck:
    """Run the stock pipeline and check every step.

    Args:
        pipeline: carries the student's scheduler.
        arguments: of its call, with ``num_inference_steps`` and, where it takes one, ``generator``.
        schedule: the teacher's.
        prediction_type: what the network says, see :data:`fewstep.diffusion.prediction.KINDS`.
        move: what a step does.
        component_at: the component that training calls at a scheduler's timestep.
        reference: also compare the network's answers with the recipe's, at the same x and timestep.
        pictured: the first sample may hold a trace of a picture (HunyuanVideo: a thousandth).

    Raises:
        SchedulerCheckError: the pipeline does not run with this scheduler, or a step is not the student's; the message
            names it.
    """
    teller = _Teller(schedule, prediction_type)
    try:
        seen = trace(pipeline, arguments, teller)
    except (ExportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a pipeline raises under a foreign scheduler is the reason it does not serve
        raise SchedulerCheckError(f"{_name(pipeline)} does not run: {one_line(error)}") from error

    name, steps = _name(pipeline), seen.steps
    times = _times(name, steps, arguments["num_inference_steps"], schedule)
    deviations = _check_steps(name, steps, times, teller, move)
    if steps[0].sample.dtype in (torch.float16, torch.bfloat16):
        again = _Teller(schedule, prediction_type)
        precise = replay(pipeline, seen, again)
        deviations += _check_steps(name, precise.steps, times, again, move)
    for step in steps:
        _check_called(name, step, component_at(step.timestep))
    if reference is not None:
        deviations += _check_answers(name, steps, schedule, component_at, reference)
    drawn = [draw for step in steps[:-1] for draw in step.draws]
    follows = None
    if move.renoise != "ode" and drawn:
        follows = "generator" if all(draw.own_generator for draw in drawn) else "global seed"
    x_t = _x_t(schedule, steps[0].network_input, times[0])
    start = start_of(
        seen, getattr(pipeline, find_scheduler(pipeline)), x_t, _TOLERANCE[steps[0].sample.dtype], pictured
    )
    if start is None:
        raise SchedulerCheckError(f"{name} does not start from unit noise times a number")
    return SchedulerCheck(
        timesteps=tuple(step.timestep for step in steps),
        grid=tuple(min(float(t[0]), 1.0) for t in times),
        initial_scale=start.scale,
        noise_follows=follows,
        deviation=max(deviations),
        traced=start.traced,
    )


class _Teller:
    """Says a random clean sample at each step, in the network's own prediction type, and remembers it."""

    def __init__(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        self.schedule, self.prediction_type = schedule, prediction_type
        self.x0: list[Tensor] = []

    def __call__(self, network_input: Tensor, timestep: float, answer: Tensor) -> Tensor:
        if answer.shape != network_input.shape:
            raise SchedulerCheckError(
                f"the network says {list(answer.shape)} about a sample of {list(network_input.shape)}"
            )
        t = _time(self.schedule, timestep, answer)
        generator = torch.Generator().manual_seed(1000 + len(self.x0))
        self.x0.append(torch.randn(answer.shape, generator=generator, dtype=torch.float64))
        x_t = _x_t(self.schedule, network_input, t)
        return from_x0(self.x0[-1], self.prediction_type, x_t, self.schedule, t).to(answer)


def _times(name: str, steps: list[TracedStep], count: int, schedule: NoiseSchedule) -> list[Tensor]:
    """The t (B,) of each step; they must be ``count`` and descend, see :func:`fewstep.diffusion.timesteps.descends`."""
    if len(steps) != count:
        raise SchedulerCheckError(f"{name} makes {len(steps)} steps instead of {count}")
    times = [_time(schedule, step.timestep, step.sample) for step in steps]
    grid = [float(t[0]) for t in times]
    if not descends(grid):
        listed = ", ".join(f"{t:.7g}" for t in grid)
        raise SchedulerCheckError(f"{name} visits the times {listed}, which do not descend from 1 to above 0")
    return times


def _check_steps(name: str, steps: list[TracedStep], times: list[Tensor], teller: _Teller, move: Move) -> list[float]:
    return [_check_step(name, index, steps, times, teller, move) for index in range(len(steps))]


def _check_step(
    name: str, index: int, steps: list[TracedStep], times: list[Tensor], teller: _Teller, move: Move
) -> float:
    step, t, schedule, x0 = steps[index], times[index], teller.schedule, teller.x0[index]
    # Rounding errors are relative to the sample, whose size is that of its noise under an EDM schedule, and an error of
    # the rounded answer grows by what turns it into x0; at the top of a table that is large.
    _, gain = x0_map(teller.prediction_type, schedule, t)
    size = max(1.0, float(schedule.coefficients(t).sigma[0]))
    tolerance = _TOLERANCE[step.told.dtype] * size * (1 + float(gain[0].abs()))
    where = f"step {index + 1} of {len(steps)} (timestep {step.timestep:g})"
    x_t, now = _x_t(schedule, step.network_input, t), schedule.coefficients(t)
    if index + 1 == len(steps):
        # The last sample is clean, and a clean sample is the same in every scheduler's space. (TCD's, of a table, has
        # alpha and sigma of its lowest entry, which is in the space of x_t.)
        end = walk_end(schedule, move.renoise)
        clean = x0 if end == 0 else ode_step(x_t, x0, now, schedule.coefficients(torch.full_like(t, end)))
        return _demand(step.result.double().cpu(), clean, tolerance, f"{name}: after {where} the sample is not x0")
    then = times[index + 1]
    if move.renoise == "tcd":
        expected = strategic_step(schedule, x_t, x0, t, then, move.gamma, _fresh_noise(name, where, step))
    elif move.renoise == "ode":
        expected = add_noise(x0, noise_from_x0(x0, x_t, now), schedule.coefficients(then))
    else:
        expected = add_noise(x0, _fresh_noise(name, where, step), schedule.coefficients(then))
    following = _x_t(schedule, steps[index + 1].network_input, times[index + 1])
    return _demand(following, expected, tolerance, f"{name}: {where} does not lead to the teacher's x_t")


def _fresh_noise(name: str, where: str, step: TracedStep) -> Tensor:
    fitting = [draw.value for draw in step.draws if draw.value.shape == step.sample.shape]
    if len(fitting) != 1:
        raise SchedulerCheckError(f"{name}: {where} draws no fresh noise")
    return fitting[0].double().cpu()


def _check_called(name: str, step: TracedStep, component: str) -> None:
    if component not in step.called:
        called = ", ".join(sorted(step.called)) or "nothing"
        raise SchedulerCheckError(f"{name} calls {called} at timestep {step.timestep:g}, where {component} is trained")


def _check_answers(
    name: str,
    steps: list[TracedStep],
    schedule: NoiseSchedule,
    component_at: Callable[[float], str],
    reference: Reference,
) -> list[float]:
    """The pipeline's answers against the recipe's at the same input: do the fed values mean the same time?"""
    _check_told(name, steps, reference.recipe)
    deviations = []
    ends = [step.timestep for step in steps[1:]] + [float(schedule.timestep(torch.zeros(1, dtype=torch.float64)))]
    for index, (step, end) in enumerate(zip(steps, ends)):
        x = step.network_input
        rows = torch.zeros(x.shape[0], dtype=torch.long)
        conditioning = reference.conditioning.select(rows)
        timestep = torch.full((x.shape[0],), step.timestep, dtype=torch.float64)
        following = torch.full((x.shape[0],), end, dtype=torch.float64)
        with torch.no_grad():
            network = reference.networks[component_at(step.timestep)]
            own = reference.recipe.call(network, x, timestep, conditioning, next_timestep=following)
        relative = _ANSWER_TOLERANCE[step.answer.dtype]
        if x.device.type != "cpu":
            relative = max(relative, 1e-3)  # other kernels for other batches, and float32 matrices in TF32
        tolerance = relative * max(float(own.double().abs().max()), 1e-6)
        where = f"step {index + 1} of {len(steps)}"
        text = f"{name}: {where} does not feed the network what timestep {step.timestep:g} means"
        deviations.append(_demand(step.answer.double().cpu(), own.double().cpu(), tolerance, text))
    return deviations


def _check_told(name: str, steps: list[TracedStep], recipe: Recipe) -> None:
    """The sample has the recorded shape, and no two steps are one time to the network (some round it)."""
    shape = tuple(steps[0].network_input.shape[1:])
    if shape != recipe.sample_shape:
        raise SchedulerCheckError(
            f"{name} samples {list(shape)}, and the teacher was recorded with {list(recipe.sample_shape)}: the call is "
            "not the recorded one"
        )
    timesteps = torch.tensor([step.timestep for step in steps], dtype=torch.float64)
    for rule in recipe.times:
        told = rule.numbers(timesteps).tolist()
        if rule.source == "timestep" and len(set(told)) < len(told):
            listed = ", ".join(f"{value:g}" for value in told)
            raise SchedulerCheckError(f"{name} tells the network the times {listed}, two of which are the same")


def _time(schedule: NoiseSchedule, timestep: float, like: Tensor) -> Tensor:
    return schedule.time(torch.full((like.shape[0],), timestep, dtype=torch.float64))


def _x_t(schedule: NoiseSchedule, network_input: Tensor, t: Tensor) -> Tensor:
    """x_t in the schedule's sense, float64 on the CPU: the network's input without the scale of its time."""
    x = network_input.double().cpu()
    return x / expand(schedule.input_scale(t), x)


def _demand(value: Tensor, expected: Tensor, tolerance: float, text: str) -> float:
    """The deviation in units of the tolerance. A NaN fails."""
    off = float((value - expected).abs().max())
    if not off <= tolerance:
        raise SchedulerCheckError(f"{text} (off by {off:.2g}, allowed {tolerance:.1g})")
    return off / tolerance


def _name(pipeline: Any) -> str:
    return f"{type(getattr(pipeline, find_scheduler(pipeline))).__name__} under {type(pipeline).__name__}"


def follow(
    pipeline: Any,
    arguments: dict[str, Any],
    schedule: NoiseSchedule,
    prediction_type: str,
    move: Move,
    component_at: Callable[[float], str],
    *,
    checked: bool = True,
) -> tuple[Trace, tuple[float, ...]]:
    """Run a pipeline that need not start at the top, and check every step that it makes; its times are returned too.

    It may make none at all.

    Args:
        pipeline: as the others in :func:`walk`.
        arguments: of its call.
        schedule: the teacher's.
        prediction_type: what the network says.
        move: what a step does.
        component_at: the component that training calls at a scheduler's timestep.
        checked: whether each step must lead to the next sample; not where the pipeline keeps a part of the picture.

    Raises:
        SchedulerCheckError: a step is not the student's, or its times do not descend. What the pipeline itself raises
            passes through.
    """
    teller, name = _Teller(schedule, prediction_type), _name(pipeline)
    seen = trace(pipeline, arguments, teller)
    if not seen.steps:
        return seen, ()
    times = _times(name, seen.steps, len(seen.steps), schedule)
    if checked:
        _check_steps(name, seen.steps, times, teller, move)
    for step in seen.steps:
        _check_called(name, step, component_at(step.timestep))
    return seen, tuple(min(float(t[0]), 1.0) for t in times)
