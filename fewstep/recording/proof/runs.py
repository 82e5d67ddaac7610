"""The runs of a pipeline that a proof compares own calls with, and those calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.prediction import to_x0
from fewstep.diffusion.schedule import FlowSchedule, TableSchedule
from fewstep.recording.loop.experts import Expert
from fewstep.recording.loop.fresh import fresh_samples
from fewstep.recording.recipe import Recipe
from fewstep.recording.recorded import Recorded
from fewstep.recording.second.switch import at_steps, switched
from fewstep.recording.watch.observation import Observation, Step

STEPS = 5


def run(
    recording: Recorded,
    items: list[Any],
    seed: int,
    *,
    changes: dict[str, Any] | None = None,
    x0: bool = False,
    draw: int = 0,
) -> Observation:
    """The pipeline's own run with a fresh sample after every step.

    Args:
        recording: of the pipeline.
        items: prompts, labels or items.
        seed: of the samples.
        changes: to the recorded call with guidance off.
        x0: also ask the scheduler for its clean samples.
        draw: the seed of what the pipeline itself draws.
    """

    def unclipped(scheduler: Any) -> None:
        if hasattr(scheduler, "register_to_config"):
            names = [name for name in ("clip_sample", "thresholding") if name in scheduler.config]
            scheduler.register_to_config(**dict.fromkeys(names, False))

    visits = recording.visits
    count, stub = (STEPS, None) if visits is None else (visits.count, visits.run_live(recording.components))
    return recording.subject.run(
        count, items, changes, draw, steps=count, replace=fresh_samples(seed), x0=x0, set_up=unclipped, stub=stub
    )


def own_conditioning(recording: Recorded) -> Conditioning:
    """That of the recording's own prompt, label or item."""
    return each(recording, [recording.invocation.item])[0]


def each(recording: Recorded, items: list[Any]) -> list[Conditioning]:
    """The conditioning of each prompt, label or item."""
    if recording.conditional is None:
        return recording.condition_each() * len(items)
    return recording.condition_each(**{f"{recording.conditional}s": items})


def own_calls(recording: Recorded, seen: Observation) -> list[tuple[Step, Callable[[Tensor, Conditioning], Tensor]]]:
    """Each step after the first with the recipe's call at its time (without the last where a next time is needed).

    Of several experts the one of that time is called, and steps in which they did not run are left out.
    """
    recipe = recording.recipe
    if recipe.second is not None:  # switched by the number of the step, and this walk has another number of them
        recipe = replace(recipe, second=at_steps(recipe.second, seen.steps))
    pairs: list[tuple[Step, Callable[[Tensor, Conditioning], Tensor]]] = []
    for i, step in enumerate(seen.steps):
        last = recipe.needs_next and i + 1 == len(seen.steps)
        if i == 0 or last or (recording.visits is not None and i not in recording.visits.live):
            continue
        following = seen.steps[i + 1].timestep if i + 1 < len(seen.steps) else 0.0

        network = recording.expert_at(step.timestep).network
        pairs.append((step, partial(_own_call, recipe, network, step.timestep, following)))
    return pairs


def steps_of(recording: Recorded, expert: Expert, seen: Observation) -> list[Step]:
    """The steps after the first in which an expert was called; those first in which a second network has a say."""
    steps = [step for step in seen.steps[1:] if recording.expert_at(step.timestep) is expert]
    second = recording.recipe.second
    if second is None or second.switch is None:
        return steps
    on = dict(switched(second, steps))
    return sorted(steps, key=lambda step: not on[step.timestep])


def _own_call(
    recipe: Recipe, network: nn.Module, timestep: float, following: float, x: Tensor, conditioning: Conditioning
) -> Tensor:
    next_timestep = times(following, len(x)) if recipe.needs_next else None
    with torch.no_grad():
        return recipe.call(network, x, times(timestep, len(x)), conditioning, next_timestep=next_timestep)


def times(timestep: float, batch: int) -> Tensor:
    """One timestep for every sample: (B,) float64."""
    return torch.full((batch,), timestep, dtype=torch.float64)


def against_scheduler(recording: Recorded, seen: Observation) -> float | None:
    """x0 by the schedule and prediction type against the scheduler's own, over the steps where it has one."""
    errors = []
    compared = [(step, x0) for step in seen.steps if (x0 := step.x0) is not None]
    if isinstance(recording.schedule, TableSchedule):
        # Between its entries a table is interpolated, and by schedulers otherwise than here, in the fifth digit.
        compared = [(step, x0) for step, x0 in compared if float(step.timestep).is_integer()] or compared
    for step, wanted in compared:
        t = recording.schedule.time(times(step.timestep, len(step.sample)))
        if step.sigma is not None and isinstance(recording.schedule, FlowSchedule):
            # Flow schedulers may round their timesteps to integers; the noise level they step by is the float sigma.
            t = torch.full_like(t, step.sigma)
        scale = recording.schedule.input_scale(t).view(-1, *[1] * (step.sample.dim() - 1))
        x_t = step.network_input.double() / scale
        x0 = to_x0(step.model_output.double(), recording.prediction_type, x_t, recording.schedule, t)
        errors.append(relative_error(_moving(recording, x0), _moving(recording, wanted)))
    return max(errors) if errors else None


def _moving(recording: Recorded, x: Tensor) -> Tensor:
    """``x`` (B, ...) with 0 where the pipeline keeps an item's entries as they are, whatever its scheduler says."""
    clean = None if recording.between is None else recording.between.clean
    return x if clean is None else x.masked_fill(clean.to(x.device), 0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest magnitude; 0 for two zero tensors."""
    difference = (got.double() - wanted.double()).abs().max().item()
    scale = wanted.double().abs().max().item()
    return difference if difference == 0 else difference / max(scale, 1e-30)
