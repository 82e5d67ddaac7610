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
from fewstep.diffusion.prediction import add_noise, from_x0, noise_from_x0, ode_step, x0_map
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.strategic import Move, strategic_step, walk_end
from fewstep.diffusion.timesteps import descends
from fewstep.errors import one_line
from fewstep.export.errors import ExportError, SchedulerCheckError
from fewstep.export.walk.demand import TOLERANCE, demand, time_of, x_t_of
from fewstep.export.walk.pins import Pinned, check_pins
from fewstep.export.walk.start import start_of
from fewstep.export.walk.trace import Trace, TracedStep, replay, trace
from fewstep.recording import Recipe
from fewstep.recording.pipeline import find_scheduler

# The recipe against the pipeline: another batch, perhaps another kernel, of the same network.
_ANSWER_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
    pinned: Pinned | None = None,
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
        pinned: what the pipeline puts back between steps; None: nothing.

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
    free = None if pinned is None else ~pinned.where
    deviations = _check_steps(name, steps, times, teller, move, free)
    if steps[0].sample.dtype in (torch.float16, torch.bfloat16):
        again = _Teller(schedule, prediction_type)
        precise = replay(pipeline, seen, again)
        deviations += _check_steps(name, precise.steps, times, again, move, free)
    for step in steps:
        _check_called(name, step, component_at(step.timestep))
    if reference is not None:
        deviations += _check_answers(name, steps, schedule, component_at, reference)
    drawn = [draw for step in steps[:-1] for draw in step.draws]
    follows = None
    if move.renoise != "ode" and drawn:
        follows = "generator" if all(draw.own_generator for draw in drawn) else "global seed"
    x_t = x_t_of(schedule, steps[0].network_input, times[0])
    scheduler, close = getattr(pipeline, find_scheduler(pipeline)), TOLERANCE[steps[0].sample.dtype]
    now = schedule.coefficients(times[0])
    level = float(now.alpha[0]), float(now.sigma[0])
    start = start_of(seen, scheduler, x_t, close, pictured, None if pinned is None else pinned.kept, level)
    if start is None:
        raise SchedulerCheckError(f"{name} does not start from unit noise times a number")
    if pinned is not None:
        deviations += check_pins(name, steps, times, schedule, pinned, x_t / start.scale)
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
        t = time_of(self.schedule, timestep, answer)
        generator = torch.Generator().manual_seed(1000 + len(self.x0))
        self.x0.append(torch.randn(answer.shape, generator=generator, dtype=torch.float64))
        x_t = x_t_of(self.schedule, network_input, t)
        return from_x0(self.x0[-1], self.prediction_type, x_t, self.schedule, t).to(answer)


def _times(name: str, steps: list[TracedStep], count: int, schedule: NoiseSchedule) -> list[Tensor]:
    """The t (B,) of each step; they must be ``count`` and descend, see :func:`fewstep.diffusion.timesteps.descends`."""
    if len(steps) != count:
        raise SchedulerCheckError(f"{name} makes {len(steps)} steps instead of {count}")
    times = [time_of(schedule, step.timestep, step.sample) for step in steps]
    grid = [float(t[0]) for t in times]
    if not descends(grid):
        listed = ", ".join(f"{t:.7g}" for t in grid)
        raise SchedulerCheckError(f"{name} visits the times {listed}, which do not descend from 1 to above 0")
    return times


def _check_steps(
    name: str,
    steps: list[TracedStep],
    times: list[Tensor],
    teller: _Teller,
    move: Move,
    free: Tensor | None = None,
) -> list[float]:
    return [_check_step(name, index, steps, times, teller, move, free) for index in range(len(steps))]


def _check_step(
    name: str,
    index: int,
    steps: list[TracedStep],
    times: list[Tensor],
    teller: _Teller,
    move: Move,
    free: Tensor | None,
) -> float:
    """How far a step leads from where it should, at the entries ``free`` of pins: bool (1, ...); None: at all."""
    step, t, schedule, x0 = steps[index], times[index], teller.schedule, teller.x0[index]
    # Rounding errors are relative to the sample, whose size is that of its noise under an EDM schedule, and an error of
    # the rounded answer grows by what turns it into x0; at the top of a table that is large.
    _, gain = x0_map(teller.prediction_type, schedule, t)
    size = max(1.0, float(schedule.coefficients(t).sigma[0]))
    tolerance = TOLERANCE[step.told.dtype] * size * (1 + float(gain[0].abs()))
    where = f"step {index + 1} of {len(steps)} (timestep {step.timestep:g})"
    x_t, now = x_t_of(schedule, step.network_input, t), schedule.coefficients(t)
    if index + 1 == len(steps):
        # The last sample is clean, and a clean sample is the same in every scheduler's space. (TCD's, of a table, has
        # alpha and sigma of its lowest entry, which is in the space of x_t.)
        end = walk_end(schedule, move.renoise)
        clean = x0 if end == 0 else ode_step(x_t, x0, now, schedule.coefficients(torch.full_like(t, end)))
        text = f"{name}: after {where} the sample is not x0"
        return demand(step.result.double().cpu(), clean, tolerance, text, free)
    then = times[index + 1]
    if move.renoise == "tcd":
        expected = strategic_step(schedule, x_t, x0, t, then, move.gamma, _fresh_noise(name, where, step))
    elif move.renoise == "ode":
        expected = add_noise(x0, noise_from_x0(x0, x_t, now), schedule.coefficients(then))
    else:
        expected = add_noise(x0, _fresh_noise(name, where, step), schedule.coefficients(then))
    following = x_t_of(schedule, steps[index + 1].network_input, times[index + 1])
    return demand(following, expected, tolerance, f"{name}: {where} does not lead to the teacher's x_t", free)


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
        deviations.append(demand(step.answer.double().cpu(), own.double().cpu(), tolerance, text))
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
