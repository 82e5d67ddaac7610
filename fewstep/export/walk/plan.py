"""Planning a student before it is trained: its scheduler, its grid, its call, and the proof that they go together.

Everything is found by running the teacher's own pipeline with candidate schedulers (:mod:`.check`); the
first whose walk holds wins. The trainer then trains on the grid that the shipped scheduler was seen to visit.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fewstep.diffusion.schedule import FlowSchedule, TableSchedule
from fewstep.diffusion.strategic import Move
from fewstep.diffusion.timesteps import WalkTimes, descends, even_grid
from fewstep.export.errors import ExportError, NoRenoisingError, SchedulerCheckError
from fewstep.export.inputs import NEGATIVES
from fewstep.export.walk.check import Reference, SchedulerCheck, walk
from fewstep.export.walk.control import as_walked, walks_alike
from fewstep.export.walk.pins import Pinned
from fewstep.export.walk.refusals import refuse
from fewstep.export.walk.scheduler import Wish, candidates, wanted_grid
from fewstep.export.walk.sizes import SizeShift, dynamic_config, size_shifts, walked_sizes
from fewstep.export.walk.teacher_shift import shifts_by_size, teacher_shift
from fewstep.export.walk.trace import trace
from fewstep.recording.guidance.runs import scale_arguments
from fewstep.recording.pipeline import find_scheduler, with_parts

if TYPE_CHECKING:
    from torch import nn

    from fewstep.recording import Recording

_TRACED = "; the pipeline adds a trace of its picture to the first noise, which training does without"


@dataclass(frozen=True)
class StudentPlan:
    """How a student is trained to move and will be shipped.

    Attributes:
        scheduler: a stock scheduler instance, ready to ship.
        renoise: ``"ode"``, ``"fresh"`` or ``"tcd"``.
        steps: length of the grid.
        timesteps: what the pipeline passes to its scheduler at that count.
        grid: the same as t in (0, 1], descending; the trainer trains on it.
        counts: the step counts up to ``steps`` at which the walk holds.
        grids: their grids.
        call: the keyword arguments that sample it right, prompt, labels or items apart; JSON can hold it.
        initial_scale: the first x_t is this times unit noise.
        noise_follows: ``"generator"``, ``"global seed"``; None for ODE.
        prediction_type: what the network says.
        shift: of a flow grid; 1.0 for other families.
        note: one line that says how renoise and scheduler were decided.
        trained_at_every_count: whether the student is trained at the times of every count, not only of ``steps``.
        guidance_range: the guidance scales that the student's network is told in training, None where it is told none.
        guidable: whether it is guided when it is sampled, as its teacher is; its walks are proved without guidance.
        example: a prompt or label that the student was trained for, which its card shows; None where that is not known.
        dynamic: whether its scheduler shifts by the size as the teacher's does; else its grid is one for every size.
        sizes: the teacher's shifts at several sizes, the trained one first; empty where it has one for all.
        gamma: of ``"tcd"``: how much of the noise each step draws anew.
        part: of one of several students: which, and what it was trained for (:class:`fewstep.data.partition.Part`).
    """

    scheduler: Any
    renoise: str
    steps: int
    timesteps: tuple[float, ...]
    grid: tuple[float, ...]
    counts: tuple[int, ...]
    grids: dict[int, tuple[float, ...]]
    call: dict[str, Any]
    initial_scale: float
    noise_follows: str | None
    prediction_type: str
    shift: float
    note: str
    trained_at_every_count: bool = False
    guidance_range: tuple[float, float] | None = None
    guidable: bool = False
    example: str | int | None = None
    dynamic: bool = False
    sizes: tuple[SizeShift, ...] = ()
    gamma: float = 0.0
    part: dict[str, Any] | None = None

    @property
    def move(self) -> Move:
        """What a step does."""
        return Move(self.renoise, self.gamma)


def plan_student(
    recording: Recording,
    steps: int,
    *,
    renoise: str = "auto",
    shift: float | None = None,
    first_timestep: int | None = None,
    first_sigma: float | None = None,
    start: str = "noise",
    dynamic_shift: str = "static",
    gamma: float | None = None,
    times: WalkTimes | None = None,
) -> StudentPlan:
    """Find the stock scheduler that carries a student of ``steps`` steps, and prove it on the teacher's weights.

    Args:
        recording: of the teacher.
        steps: at least 1, at most the times that the teacher knows.
        renoise: ``"ode"``, ``"fresh"``, ``"tcd"``, or ``"auto"``: ODE for flow and EDM; for tables fresh noise, or
            TCD's walk with ``gamma``, where it can ship.
        shift: k of a flow grid t' = k t / (1 + (k - 1) t); None: the teacher's own, at the recorded call.
        first_timestep: start at this entry of a table instead of its top (DMD2's one-step SDXL: 399; SiD: 625).
        first_sigma: start an EDM student at this noise level instead of sigma_max (SiD: 2.5).
        start: ``"noise"``: the first x_t is unit noise; ``"marginal"``: sigma times unit noise (SiD; ODE, tables).
        dynamic_shift: of a teacher that shifts its grid by the size: ``"static"``: the student has the grid of the
            recorded size at every size; ``"keep"``: its scheduler shifts as the teacher's, if that holds at several.
        gamma: of a student that walks as TCD's do: how much of the noise each step draws anew, in (0, 1].
        times: of a flow's walk, in the place of an even or a shifted grid; those of other teachers stay as they are.

    Raises:
        ExportError: the wish cannot ship; one line names the reason.
    """
    schedule = recording.schedule
    refuse(recording, steps, renoise, shift, first_timestep, first_sigma, start, gamma)
    is_flow, is_table = isinstance(schedule, FlowSchedule), isinstance(schedule, TableSchedule)
    keep = dynamic_shift == "keep"
    if keep and shift is not None:
        raise ExportError("dynamic_shift keep leaves the shift to the pipeline; leave one of it and the shift out")
    dynamic = dynamic_config(recording) if keep else None
    wish = Wish(
        schedule=schedule,
        prediction_type=recording.prediction_type,
        steps=steps,
        renoise=renoise,
        shift=_flow_shift(recording, shift, steps if keep else None) if is_flow and times is None else 1.0,
        first_timestep=first_timestep,
        first_sigma=first_sigma,
        start=start,
        dynamic=dynamic,
        gamma=gamma or 0.0,
        times=times if is_flow else None,
    )
    if is_flow and not descends(even_grid(steps, wish.shift).tolist()):
        raise ExportError(
            f"a shift of {wish.shift:.4g} leaves {steps} steps whose times cannot be told apart; state one (--shift)"
        )
    measured = shift is None and wish.times is None and shifts_by_size(recording)
    origin = ", with the shift that the teacher has at the recorded size" if measured else ""
    call = student_call(recording, steps)
    reference = reference_of(recording, recording.networks)
    # Pipelines that have this argument pass it in any case, and most pass 0 where it is left out.
    takes_eta = is_table and "eta" in inspect.signature(type(recording.pipeline).__call__).parameters

    def found(way: str, reason: str) -> StudentPlan:
        told = {"eta": gamma} if way == "tcd" and takes_eta else {}
        return _plan(recording, replace(wish, renoise=way), call | told, reference, reason + origin)

    if keep:
        if renoise == "tcd":
            raise ExportError("dynamic_shift keep: no scheduler walks as TCD's and shifts by the size; take static")
        try:
            way = "fresh" if renoise == "fresh" else "ode"
            return found(way, f"{way} with the teacher's dynamic shift as asked")
        except SchedulerCheckError as error:
            raise ExportError(f"dynamic_shift keep: no such student can ship: {error}; take static") from error
    if renoise == "ode":
        return found("ode", "ODE as asked")
    noisy = "tcd" if gamma is not None else "fresh"
    words = {"fresh": "fresh noise", "tcd": f"TCD's walk with gamma {gamma}"}
    if renoise in words:
        try:
            return found(renoise, f"{words[renoise]} as asked")
        except SchedulerCheckError as error:
            raise NoRenoisingError(f"a student with {words[renoise]} cannot ship: {error}") from error
    if not is_table or start == "marginal":
        return found("ode", "auto chose ODE")
    try:
        return found(noisy, f"auto chose {words[noisy]}")
    except SchedulerCheckError as error:
        return found("ode", f"auto chose ODE, since {words[noisy]} cannot ship ({error})")


def _flow_shift(recording: Recording, given: float | None, steps: int | None) -> float:
    return teacher_shift(recording, steps=steps) if given is None else float(given)


def student_call(recording: Recording, steps: int) -> dict[str, Any]:
    """The keyword arguments that sample the student right, prompt, labels or items apart."""
    # Guidance is off in it, so what is guided away from is not part of it.
    kept = {name: value for name, value in recording.call.items() if not name.startswith(NEGATIVES)}
    return {"num_inference_steps": steps, **kept, **_no_further_scales(recording), **recording.off}


def _no_further_scales(recording: Recording) -> dict[str, float]:
    """Of a teacher that looks at pictures, the scales that guide nothing once its first one is off (a picture's), at 1.

    With another value in the student's call one would think that it is heeded. A scale that the network is told stays.
    """
    if recording.conditional != "item" or recording.embedded:
        return {}
    defaults = {name: recording.invocation.default(name) for name in scale_arguments(recording.invocation)}
    return {name: 1.0 for name, value in defaults.items() if isinstance(value, int | float) and value > 1}


def reference_of(recording: Recording, networks: dict[str, nn.Module]) -> Reference:
    """What the walk compares the pipeline's answers with: the recipe's calls of ``networks`` for the recording's item.

    Args:
        recording: of the teacher.
        networks: by component.
    """
    item = [recording.invocation.item]
    items: dict[str, Any] = {} if recording.conditional is None else {f"{recording.conditional}s": item}
    return Reference(recording.recipe.calling(networks), networks, recording.condition(**items))


def check_student(
    recording: Recording,
    pipeline: Any,
    call: dict[str, Any],
    move: Move,
    count: int,
    reference: Reference | None = None,
) -> SchedulerCheck:
    """Check a stock student pipeline at ``count`` steps under ``call``, with the recording's own prompt, label or item.

    Raises:
        SchedulerCheckError: it does not hold.
    """
    arguments = _arguments(recording, count, call)

    def component_at(timestep: float) -> str:
        return recording.expert_at(timestep).component

    told = recording.schedule, recording.prediction_type, move, component_at, reference
    return walk(pipeline, arguments, *told, recording.conditional == "item", Pinned.of(recording))


def _plan(recording: Recording, wish: Wish, call: dict[str, Any], reference: Reference, reason: str) -> StudentPlan:
    """The plan with the first scheduler that holds, walked at its other counts too."""
    if isinstance(wish.schedule, FlowSchedule):
        wish = replace(wish, last_sigma=_last_sigma(recording, wish, call))
    scheduler, found, remark = _first_that_holds(recording, wish, call, reference)
    pipeline = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): scheduler})
    walked = as_walked(recording, pipeline, call, wish.steps)
    grids = {}
    for count in _other_counts(wish.steps):
        # A count that does not hold is left out of the plan, which is how the plan says it.
        with contextlib.suppress(SchedulerCheckError):
            other = check_student(recording, pipeline, call, wish.move, count)
            # Pure noise belongs to the trained first time. (A stretched flow grid has its last time alone at one step.)
            begins = math.isclose(other.grid[0], found.grid[0]) and other.initial_scale == found.initial_scale
            if begins and walks_alike(walked, pipeline, call, count):
                grids[count] = other.grid
    grids[wish.steps] = found.grid
    sizes = size_shifts(recording, wish.steps if wish.dynamic is not None else None)
    if wish.dynamic is not None:

        def walk_at(size: Mapping[str, int]) -> SchedulerCheck:
            return check_student(recording, pipeline, {**call, **size}, wish.move, wish.steps)

        sizes = walked_sizes(sizes, wish.steps, walk_at)
    return StudentPlan(
        scheduler=scheduler,
        renoise=wish.renoise,
        steps=wish.steps,
        timesteps=found.timesteps,
        grid=found.grid,
        counts=tuple(grids),
        grids=grids,
        call=call,
        initial_scale=found.initial_scale,
        noise_follows=found.noise_follows,
        prediction_type=recording.prediction_type,
        shift=wish.shift,
        note=f"{reason}: {remark}{_idle(recording, found.timesteps)}{_TRACED * found.traced}",
        dynamic=wish.dynamic is not None,
        sizes=sizes,
        gamma=wish.gamma if wish.renoise == "tcd" else 0.0,
    )


def _idle(recording: Recording, timesteps: tuple[float, ...]) -> str:
    """Names the networks that no step of the grid leads to: a student of one step never meets the second of two."""
    called = {recording.expert_at(timestep).component for timestep in timesteps}
    idle = [name for name in recording.components if name not in called]
    return f"; no step calls {', '.join(idle)}, which stays the teacher's" if idle else ""


def _first_that_holds(
    recording: Recording, wish: Wish, call: dict[str, Any], reference: Reference
) -> tuple[Any, SchedulerCheck, str]:
    """The first candidate whose walk holds on the wished grid, else on the grid that the pipeline makes by itself."""
    wanted, failures, other = wanted_grid(wish), [], None
    is_flow = isinstance(wish.schedule, FlowSchedule)
    for scheduler in candidates(wish):
        pipeline = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): scheduler})
        try:
            walked = replace(reference, recipe=as_walked(recording, pipeline, call, wish.steps).recipe)
            found = check_student(recording, pipeline, call, wish.move, wish.steps, walked)
        except SchedulerCheckError as error:
            failures.append(str(error))
            continue
        name = type(scheduler).__name__
        if wanted is None:
            return scheduler, found, name
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found.grid, wanted)):
            return scheduler, found, f"{name}, grid {_grid_in_words(wish, found)}" if is_flow else name
        if other is None and wish.dynamic is None:
            times = ", ".join(f"{t:.4g}" for t in found.grid)
            other = scheduler, found, f"{name}; the pipeline makes its own grid ({times})"
    if other is None:
        raise SchedulerCheckError("; ".join(dict.fromkeys(failures)) or "the pipeline makes its own grid")
    return other


def _grid_in_words(wish: Wish, found: SchedulerCheck) -> str:
    if wish.times is None:
        return f"shifted by {wish.shift:.4g}"
    return f"from {found.grid[0]:.4g} to {found.grid[-1]:.4g} and the clean sample"


def _last_sigma(recording: Recording, wish: Wish, call: dict[str, Any]) -> float | None:
    """The smallest of the sigmas that the pipeline passes to ``set_timesteps`` at the student's count."""
    first = next(candidates(wish))
    pipeline = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): first})
    try:
        sigmas = trace(pipeline, _arguments(recording, wish.steps, call), None).asked.get("sigmas")
    except Exception:  # it does not run under this scheduler; the walk of the candidate itself will say why
        return None
    return None if sigmas is None else float(min(sigmas))


def _other_counts(steps: int) -> list[int]:
    """The counts below ``steps`` to walk: all of them, for long grids the powers of two (a walk costs its count)."""
    return [count for count in range(1, steps) if steps <= 16 or count & (count - 1) == 0]


def _arguments(recording: Recording, count: int, call: dict[str, Any]) -> dict[str, Any]:
    """One sample of the recording's own prompt, label or item under exactly ``call``, at ``count`` steps."""
    arguments = recording.invocation.arguments([recording.invocation.item], count)
    dropped = set(recording.call) - set(call)
    kept = {name: value for name, value in arguments.items() if name not in dropped}
    return {**kept, **call, "num_inference_steps": count}
