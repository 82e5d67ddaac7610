"""Whole training steps beside the same steps in the order of other packages, restated in our words on our networks.

What is compared is the order of work alone: both sides have the same roles, samples, losses and derivative. Theirs are
no code of those packages, and no part of this one's core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.diffusion.rollout import draw_sample
from fewstep.eval.bench.runs import Case, Run, config_of, open_shape
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, Spread, alternate, ratios
from fewstep.losses.mean_flow import mean_flow_target
from fewstep.networks.flow_map import gap
from fewstep.programs.planning.dry_run import backward
from fewstep.training.method import Turn

#: Gradients of both sides agree to this, relative to the largest.
EQUAL = 1e-4


@dataclass(frozen=True)
class Pair:
    """A step of ours and one of theirs.

    Attributes:
        name: for people.
        case: of the run that both play on.
        theirs: the gradients of the student's update in their order.
    """

    name: str
    case: Case
    theirs: Callable[[Run, int], list[Tensor]]


def mean_flow_twice(run: Run, step: int) -> list[Tensor]:
    """MeanFlow as FastGen's order has it: the derivative of the whole batch, its primal thrown away, the pass again."""
    method: Any = run.method
    batch = batch_of(run, step)
    apart = [row for row, coin in enumerate(batch.draws.coins("apart", method.config.apart)) if coin]
    flow = method.flow(batch, apart)
    at = flow.x_t, flow.t, flow.conditioning, flow.r
    with torch.no_grad():
        _, change = method.student.velocity_and_derivative(*at, flow.velocity)
    target = mean_flow_target(flow.velocity, change, gap(method.schedule, flow.t, flow.r), 1.0)
    loss = method.loss(method.student.velocity(*at), target).mean()
    return gradients(run, [loss])


def dmd2_in_turn(run: Run, step: int) -> list[Tensor]:
    """DMD2's student turn in FastGen's order: the teacher with a graph that is cut, its two answers in two calls.

    The distances in float64, as DMD2's own code has them, and every gradient asked on the host whether it is finite.
    """
    method: Any = run.method
    batch = batch_of(run, step)
    last = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
    x0 = draw_sample(method.student, method.sampler, batch.draws, batch.shape, batch.conditioning, last)
    here = method.compared(x0, batch.draws, "matching")
    teacher, told = run.method.roles["teacher"], batch.conditioning
    negative = method.teacher.negative.select([0] * batch.size)
    positive = teacher(here.x_t, here.t, told).detach().double()
    with torch.no_grad():
        away = teacher(here.x_t, here.t, negative).double()
        x0_critic = method.critic(here.x_t, here.t, told).double()
    x0_teacher = away + method.teacher.guidance_scale * (positive - away)
    near = (x0.detach().double() - x0_teacher).abs().flatten(1).mean(1)
    direction = (x0_critic - x0_teacher) / near[:, None, None, None]
    direction = torch.nan_to_num(direction)
    loss = 0.5 * (x0.double() - (x0.double() - direction).detach()).square().mean()
    found = gradients(run, [loss])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)
    return found


PAIRS = (
    Pair(
        "MeanFlow, a quarter apart: FastGen's order",
        Case("", "mean_flow", {"steps": 4, "num_pairs": 16, "pair_steps": 2}, (3,)),
        mean_flow_twice,
    ),
    Pair("DMD2, the student's turn: FastGen's order, float64", Case("", "dmd2", {"steps": 4}, (5,)), dmd2_in_turn),
)


def measure(
    device: torch.device, folder: Path, *, blocks: int = 5, shape: str = "small_unet", pairs: Sequence[Pair] = PAIRS
) -> Table:
    """Every pair: first whether both have the same gradients, then their times in turn.

    Args:
        device: of the networks.
        folder: for files of runs.
        blocks: of each pair.
        shape: of the network.
        pairs: which.
    """
    table = Table(
        "Steps beside the same in another order: forward and backward of the student's update",
        ("step", "ours (ms)", "theirs (ms)", "theirs / ours", "largest difference of gradients"),
    )
    teacher = open_shape(shape, folder, device)
    for place, pair in enumerate(pairs):
        run = Run(pair.case, teacher, config_of(pair.case, folder / str(place), shape, cpu=device.type == "cpu"))
        (step,) = pair.case.steps
        difference = largest(ours(run, step), pair.theirs(run, step))
        works = {"ours": partial(ours, run, step), "theirs": partial(pair.theirs, run, step)}
        seconds = alternate(works, Clock(device), blocks)
        gain = ratios(seconds["theirs"], seconds["ours"])
        taken = {name: Spread.of([one * 1e3 for one in values]) for name, values in seconds.items()}
        if difference > EQUAL:
            table.failures.append(f"{pair.name}: gradients differ by {difference:.1e}, {EQUAL:.0e} is allowed")
        table.add(
            [pair.name, taken["ours"].words(0), taken["theirs"].words(0), f"{gain.words()} x", f"{difference:.1e}"],
            name=pair.name,
            ours_ms=vars(taken["ours"]),
            theirs_ms=vars(taken["theirs"]),
            gain=vars(gain),
            difference=difference,
        )
    table.notes += [
        "Both sides run on the same roles and draws; the derivative is ours on both. Peak memory is not compared here."
    ]
    return table


def ours(run: Run, step: int) -> list[Tensor]:
    """The gradients of the student's update, as the loop takes them."""
    for turn in run.method.turns(step, batch_of(run, step)):
        if isinstance(turn, Turn) and turn.role == "student":
            backward(run.method, turn)
            break
    parameters = run.method.roles["student"].parameters()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def batch_of(run: Run, step: int) -> Batch:
    """The batch of a step, with fresh draws of the same numbers."""
    share = run.loop.share
    return run.batches.micro_batch(run.loop.config.seed, step, share.indices(0, 0), share.samples, False)


def gradients(run: Run, losses: list[Tensor]) -> list[Tensor]:
    """Of a sum of losses, at the student's parameters; zeros where nothing flows."""
    parameters = run.method.roles["student"].parameters()
    found = torch.autograd.grad(losses, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    scale = max(float(gradient.abs().max()) for gradient in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / scale
