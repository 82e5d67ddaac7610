"""`record(pipeline)`: learn from a pipeline's own `__call__` how its denoiser is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fewstep.conditioning.item import Item
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule, TableSchedule, from_scheduler
from fewstep.recording.call.invocation import read_invocation
from fewstep.recording.call.items import as_items
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.guidance.guided import embedded_paths, record_guided, switch_off, unguided_step
from fewstep.recording.guidance.items import record_item_guidance
from fewstep.recording.items.between_steps import see_between
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.learning import learn_items
from fewstep.recording.items.redrawn import entries_stand, say_what_stops
from fewstep.recording.loop.call_parts import equal, mark_arguments, without_sample
from fewstep.recording.loop.denoisers import Denoisers
from fewstep.recording.loop.experts import Expert, components_of, expert_at
from fewstep.recording.loop.few_step import refuse_few_step, refuse_fixed_grid
from fewstep.recording.loop.find_experts import check_alike, find_experts, find_visits, loop_components
from fewstep.recording.loop.fresh import fresh_samples
from fewstep.recording.loop.long_run import LONG, SHORT, live_steps, long_count, steps_answered
from fewstep.recording.loop.starts import from_noise_alone, skipped_steps
from fewstep.recording.pipeline import find_scheduler, modules_of
from fewstep.recording.recipe import Recipe
from fewstep.recording.recording import Recording
from fewstep.recording.rules.dtypes import dtype_name, network_dtype
from fewstep.recording.rules.fit import fit_output, fit_sample, fit_times
from fewstep.recording.rules.item_fit import RedrawnError, fit_entries, fit_output_entries
from fewstep.recording.rules.rules import TimeRule
from fewstep.recording.second.fit import components_beside, fit_second, outputs_beside, refuse_shared, stand_in
from fewstep.recording.second.switch import at_steps
from fewstep.recording.watch.encoded_once import encoded_once
from fewstep.recording.watch.observation import Observation, Step, Stub
from fewstep.recording.watch.shake import shaken
from fewstep.recording.watch.subject import Subject

# A run so long that its last times are next to none.
_LONGEST = 1000


def record(pipeline: Any, items: Sequence[Item | Mapping[str, Any]] | None = None, **call: Any) -> Recording:
    """Run `pipeline(**call)` for a few steps under observation and learn how it calls its denoiser.

    The pipeline is left exactly as found. The guidance in `call` matters only where it is embedded in the network;
    everything is recorded with classifier-free guidance off, and the negative beside it.

    Args:
        pipeline: a diffusers pipeline.
        items: for a pipeline that is told pictures, two items with different ones at least: the arguments of its call
            that are a sample's own, such as {"prompt": ..., "image": ...}. The rules are learnt from the first.
        call: keyword arguments of the pipeline's call (prompt or labels, height, width, num_frames, ...).

    Raises:
        RecordingError: the pipeline cannot be recorded; one line says what was seen and what to do.
    """
    refuse_offloaded(pipeline)
    if items is None:
        return _record(pipeline, None, call)
    known: dict[str, Any] = {}
    with encoded_once(pipeline, known):
        return replace(_record(pipeline, as_items(items), call), _encoded=known)


def _record(pipeline: Any, items: Sequence[Item] | None, call: dict[str, Any]) -> Recording:
    invocation = read_invocation(pipeline, call, items)
    refuse_few_step(pipeline, invocation)
    try:
        schedule, prediction_type = from_scheduler(getattr(pipeline, find_scheduler(pipeline)))
    except ValueError as error:
        raise RecordingError(str(error)) from error
    whole = Subject(pipeline, invocation, {})
    subject, component = switch_off(whole if items is None else from_noise_alone(whole))

    _refuse_size_without_effect(subject, component)
    runs, experts = unguided_runs(subject, component, schedule)
    _check_walk(pipeline, schedule, runs[1])
    beside = components_beside(*runs)
    subject = replace(subject, loop=(*components_of(experts), *beside))
    two = None
    if items is None:
        two = subject.run(SHORT, [invocation.item] * 2, before=component).pending[-1].arguments
    check_alike(experts, _all(runs))
    try:
        recipe = fit_recipe(subject, experts, schedule, runs, two)
    except RecordingError as error:
        if len(experts) == 1:
            raise
        names = ", ".join(components_of(experts))
        raise RecordingError(f"{names} share the loop by time, but not one recipe calls them all: {error}") from error
    check_alike(experts, _all(runs), recipe)

    opening, stub = runs[0][0], stand_in(components_of(experts), runs)
    first = opening.calls[-1]
    del runs  # which may be large
    told = between = check = None
    if two is not None:
        one = without_sample(first, recipe)
        marked = mark_arguments(component, one, {name: value for name, value in two.items() if name in one})
    else:
        check = ItemCheck(stub, first, recipe)
        between = see_between(subject, recipe, schedule, check)
        marked, told = learn_items(subject, experts[0].network, component, recipe, opening, check)
    visits = find_visits(subject, experts, stub) if len(experts) > 1 else None
    denoisers = Denoisers(experts, recipe, marked, stub, visits)
    embedded = embedded_paths(subject, denoisers)
    negative = None
    if told is None:
        report, negative, guided = record_guided(subject, denoisers, embedded)
    else:
        report, guided = record_item_guidance(subject, denoisers, embedded, told)
    return Recording(
        pipeline=pipeline,
        component=component,
        network=experts[0].network,
        invocation=subject.invocation,
        recipe=recipe,
        schedule=schedule,
        prediction_type=prediction_type,
        guidance=report,
        initial_noise_scale=_initial_noise_scale(subject, stub),
        off=subject.off,
        guided=guided,
        marked=denoisers.marked,
        embedded=embedded,
        experts=experts,
        visits=visits,
        told=told,
        between=between,
        check=check,
        _negative=negative,
    )


def refuse_offloaded(pipeline: Any) -> None:
    """Raise for pipelines whose networks are moved or replaced while they run."""
    name = type(pipeline).__name__
    if not hasattr(pipeline, "components") or not callable(pipeline):
        raise RecordingError(f"{name} is not a diffusers pipeline; load one with DiffusionPipeline.from_pretrained")
    hooked = [key for key, module in modules_of(pipeline).items() if hasattr(module, "_hf_hook")]
    if hooked or getattr(pipeline, "hf_device_map", None) or getattr(pipeline, "_all_hooks", None):
        raise RecordingError(
            f"{name} is offloaded ({', '.join(hooked) or 'device map'}); load it without offloading or a device map"
        )


def unguided_runs(
    subject: Subject, component: str, schedule: NoiseSchedule
) -> tuple[list[list[Step]], tuple[Expert, ...]]:
    """The steps of the short and the long run, checked to hold one network call each, and the networks called."""
    # What follows fresh noise is the sample: of a network that is told more in one argument, that is how it is found.
    beside = subject.invocation.conditional == "item"
    seen = subject.run(SHORT, steps=SHORT, replace=fresh_samples(0) if beside else None)
    _refuse_late_start(subject, seen)
    short = seen.steps
    second = _second_component(subject, short) if beside else ()
    names = loop_components(subject, component, short, beside=second)
    output, others = short[0].calls[-1].output, outputs_beside(short[0], second)
    replace = fresh_samples(1) if beside else None
    count = long_count(short)
    stub = Stub(names, output, live_steps(count), beside=others)
    long = subject.run(count, steps=count, stub=stub, replace=replace).steps
    refuse_fixed_grid(subject.pipeline, len(long), count)
    names = loop_components(subject, component, short, long, beside=second)
    experts = find_experts(subject, names, [short, long], schedule)
    if len(experts) > 1:
        # Again, with every one of them running in some steps.
        stub = Stub(names, output, live_steps(count, long, experts), beside=others)
        del long  # which may be large
        long = subject.run(count, steps=count, stub=stub, replace=replace).steps
    runs = [short, long]
    for run in runs:
        _check_loop(subject, experts, run)
    return runs, experts


def fit_recipe(
    subject: Subject,
    experts: tuple[Expert, ...],
    schedule: NoiseSchedule,
    runs: list[list[Step]],
    two: dict[str, Any] | None,
) -> Recipe:
    """The one recipe that holds for every step, whichever network is called.

    `two` are the network's arguments at two samples; None: of an item, whose recipe is found entry by entry.
    """
    component, second, seen = experts[0].component, None, runs
    if two is None:
        try:
            for name in components_beside(*runs):
                network = modules_of(subject.pipeline)[name]
                refuse_shared(name, network, {expert.component: expert.network for expert in experts})
                second, seen = fit_second(name, network, runs, steps_answered(runs, experts))
            sample, times = fit_entries(component, seen)
        except RedrawnError as error:
            raise say_what_stops(error, subject, entries_stand(component, runs)) from error
    else:
        sample = fit_sample(component, _all(runs))
        times = fit_times(component, sample.argument, runs, two)
    if not isinstance(schedule, TableSchedule):
        times = tuple(_unrounded(rule, runs[0][0].integer) for rule in times)
        if second is not None:
            second = replace(second, times=tuple(_unrounded(rule, runs[0][0].integer) for rule in second.times))
    steps = steps_answered(runs, experts)
    if any(step.model_output.abs().max() == 0 for step in steps):
        # Layers that are still zero hide the output's sign and half.
        with shaken(*(expert.network for expert in experts)):
            again, _ = unguided_runs(subject, component, schedule)
            steps = steps_answered(again, experts)
    output = fit_output(component, steps) if two is not None else fit_output_entries(component, steps)
    if output.relation == "velocity":
        output = fit_output(component, steps + _near_zero(subject, experts, steps))
    shape = tuple(runs[0][0].network_input.shape[1:])
    if second is not None:
        # The teacher goes by the times at which its control is switched when it makes its own number of steps.
        count = subject.invocation.steps or LONG
        stub = stand_in(components_of(experts), runs)
        second = at_steps(second, subject.run(count, steps=count, stub=stub).steps if second.switch else [])
    return Recipe(component, shape, sample, times, output, dtype_name(network_dtype(experts[0].network)), second)


def _second_component(subject: Subject, steps: list[Step]) -> tuple[str, ...]:
    """The component that is called beside the network in every step, or ()."""
    found = components_beside(steps)
    if len(found) > 1:
        raise RecordingError(
            f"the loop of {subject} calls {', '.join(found)} beside its denoiser; one network beside it can be "
            "distilled with it, and no more: switch the others off in the call, or take them out of the pipeline"
        )
    return found


def _near_zero(subject: Subject, experts: tuple[Expert, ...], steps: list[Step]) -> list[Step]:
    """The last steps of a very long run, for what only the smallest times show."""
    live = frozenset(range(_LONGEST - 2, _LONGEST))
    stub = Stub(components_of(experts), steps[0].calls[-1].output, live)
    return subject.run(_LONGEST, steps=_LONGEST, stub=stub).steps[-2:]


def _all(runs: list[list[Step]]) -> list[Step]:
    return [step for run in runs for step in run]


def _check_loop(subject: Subject, experts: tuple[Expert, ...], steps: list[Step]) -> None:
    if len(steps) < 2:
        raise RecordingError(
            f"{subject} made {len(steps)} steps; a pipeline without a loop cannot be distilled: {ANOTHER}"
        )
    for step in steps:
        component = expert_at(experts, step.timestep).component
        if not step.calls:
            raise RecordingError(
                f"{subject} calls scheduler.step more often than {component}, so what it hands to it is no answer of "
                f"the network alone; it cannot be recorded: {ANOTHER}"
            )
        if not unguided_step(step, component, beside=subject.invocation.conditional == "item"):
            raise RecordingError(
                f"{subject} does not call {component} exactly once in every step with guidance off; it cannot be "
                f"recorded: {ANOTHER}"
            )


def _refuse_size_without_effect(subject: Subject, component: str) -> None:
    """Raise for a height or a width given alone that changes nothing: some pipelines then take their defaults."""
    invocation = subject.invocation
    given = [name for name in ("height", "width") if invocation.default(name) is not None]
    if len(given) != 1 or given[0] not in invocation.call or not {"height", "width"} <= invocation.parameters.keys():
        return
    (name,) = given
    told, without = (
        subject.run(SHORT, changes=changes, before=component).pending[-1].arguments for changes in ({}, {name: None})
    )
    if equal(told, without):
        raise RecordingError(
            f"{subject} makes the same samples with {name}={invocation.call[name]} and without it; give height and "
            "width, or neither"
        )


def _refuse_late_start(subject: Subject, seen: Observation) -> None:
    """Raise for a pipeline that leaves out its scheduler's first steps, so that it starts from more than noise."""
    if (skipped := skipped_steps(seen)) and seen.timesteps is not None:
        times = seen.timesteps.double().flatten()
        raise RecordingError(
            f"{subject} starts at timestep {seen.steps[0].timestep:g}, {skipped} of {len(times)} steps after the first "
            f"of its scheduler ({float(times[0]):g}): it does not start from noise alone, and only such walks can be "
            "distilled; leave out of the call what shortens it"
        )


def _check_walk(pipeline: Any, schedule: NoiseSchedule, steps: list[Step]) -> None:
    """The scheduler walks from noise to data in the schedule's time, and its timesteps name its noise levels."""
    scheduler = type(getattr(pipeline, find_scheduler(pipeline))).__name__
    times = schedule.time(torch.tensor([step.timestep for step in steps], dtype=torch.float64))
    if not (times.isfinite().all() and times[0] > times[-1]):
        raise RecordingError(
            f"{scheduler} walks from t={times[0]:.3g} to t={times[-1]:.3g}, from data to noise as fewstep reads it "
            "(inverted sigmas?); such a schedule cannot be trained on: give the pipeline another scheduler"
        )
    if not isinstance(schedule, FlowSchedule):
        return
    for step, t in zip(steps, times.tolist(), strict=True):
        # Integer timesteps are allowed: they are off by less than one.
        if step.sigma is not None and abs(step.sigma - t) * schedule.timestep_scale > 1.01:
            raise RecordingError(
                f"{scheduler} gives the network the timestep {step.timestep:g} at the noise level {step.sigma:.4g}; "
                "fewstep trains flow models whose timestep names the noise level: give the pipeline another scheduler, "
                f"or {ANOTHER}"
            )


def _initial_noise_scale(subject: Subject, stub: Stub) -> float:
    """The scheduler's init_noise_sigma, as set for this run, times what scale_model_input makes of the first sample."""
    schedulers: list[Any] = []
    step = subject.run(SHORT, steps=1, stub=stub, set_up=schedulers.append).steps[0]
    ratio = step.network_input.double().norm() / step.sample.double().norm()
    return float(getattr(schedulers[0], "init_noise_sigma", 1.0)) * float(ratio)


def _unrounded(rule: TimeRule, scheduler_rounds: bool) -> TimeRule:
    """The rule of a continuous family, without the integers of this one scheduler.

    Some schedulers (UniPC with flow sigmas) truncate 1000 sigma to an integer; the network knows all times between, and
    a student under another scheduler is fed them. A pipeline that truncates by itself does so under any scheduler.
    """
    if not scheduler_rounds or getattr(torch, rule.dtype).is_floating_point:
        return rule
    arithmetic = rule.arithmetic if getattr(torch, rule.arithmetic).is_floating_point else "float32"
    return replace(rule, dtype="float32", arithmetic=arithmetic)
