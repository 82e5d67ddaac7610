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

from fewstep.conditioning.ragged import AnyConditioning, join
from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import to_x0
from fewstep.diffusion.renoising import Renoised
from fewstep.diffusion.rollout import draw_sample
from fewstep.eval.bench.runs import Case, Run, config_of, open_shape
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, Spread, alternate, ratios
from fewstep.losses.mean_flow import mean_flow_target
from fewstep.networks.flow_map import gap
from fewstep.programs.planning.dry_run import backward
from fewstep.training.method import Turn

#: Gradients of both sides agree to this, relative to the largest: chains in float32 and in float64 before one network
#: differ by 1e-4 behind it.
EQUAL = 3e-4


@dataclass(frozen=True)
class Pair:
    """A step of ours and one of theirs.

    Attributes:
        name: for people.
        case: of the run that both play on.
        theirs: the gradients of the student's update in their order.
        equal: how far they may be from ours, relative to the largest.
    """

    name: str
    case: Case
    theirs: Callable[[Run, int], list[Tensor]]
    equal: float = EQUAL


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


def mean_flow_stacked(run: Run, step: int) -> list[Tensor]:
    """MeanFlow as mf-rae's order has it: a central difference, its two points and the plain one in one trained call.

    The two are cut off after it; the backward pass goes through all three. At the ends of the flow the difference is
    one-sided, as ours.
    """
    method: Any = run.method
    batch = batch_of(run, step)
    apart = [row for row, coin in enumerate(batch.draws.coins("apart", method.config.apart)) if coin]
    flow, points = method.flow(batch, apart), list[tuple[Tensor, ...]]()

    def asked(x_t: Tensor, t: Tensor, _conditioning: AnyConditioning, end: Tensor) -> Tensor:
        points.append((x_t, t, end))
        return torch.zeros_like(x_t)

    at = method.schedule, flow.x_t, flow.t, flow.conditioning, flow.r, flow.velocity, flow.x_t
    method.difference(asked, *at)
    x_t, t, end = (torch.cat(both) for both in zip((flow.x_t, flow.t, flow.r), *points, strict=True))
    told = flow.conditioning.select([*range(batch.size)] * 3)
    u, further, nearer = method.student.velocity(x_t, t, told, end).chunk(3)
    change = method.difference(lambda *_: torch.cat([further, nearer]).detach(), *at)
    target = mean_flow_target(flow.velocity, change, gap(method.schedule, flow.t, flow.r), 1.0)
    return gradients(run, [method.loss(u, target).mean()])


def dmd2_in_turn(run: Run, step: int) -> list[Tensor]:
    """DMD2's student turn in FastGen's order: the teacher with a graph that is cut, its two answers in two calls.

    The distances in float64, as DMD2's own code has them, and every gradient asked on the host whether it is finite.
    """
    method: Any = run.method
    x0, here, told, _ = compared(run, step)
    teacher = run.method.roles["teacher"]
    positive = teacher(here.x_t, here.t, told).detach().double()
    with torch.no_grad():
        away = teacher(here.x_t, here.t, told.others[0]).double()
        x0_critic = method.critic(here.x_t, here.t, told).double()
    found = gradients(run, [float64_loss(x0, away, positive, method.teacher.guidance_scale, x0_critic)])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)
    return found


def dmd2_in_float64(run: Run, step: int) -> list[Tensor]:
    """DMD2's student turn with the calls of ours, and between them the float64 chain of DMD2's own code.

    Both answers become x0 in float64, guidance combines two of them, and the loss is a square whose target is held.
    """
    method: Any = run.method
    x0, here, told, _ = compared(run, step)
    critic, teacher = (run.method.roles[name].single.denoiser for name in ("critic", "teacher"))
    told_twice = join([told.others[0], told.alone()])
    with torch.no_grad():
        x_t, t = torch.cat([here.x_t, here.x_t]), torch.cat([here.t, here.t])
        of_teacher, of_critic = teacher.raw(x_t, t, told_twice), critic.raw(here.x_t, here.t, told)
        kind, schedule = teacher.prediction_type, teacher.schedule
        away, positive = to_x0(of_teacher.double(), kind, x_t.double(), schedule, t).chunk(2)
        x0_critic = to_x0(of_critic.double(), kind, here.x_t.double(), schedule, here.t)
    return gradients(run, [float64_loss(x0, away, positive, method.teacher.guidance_scale, x0_critic)])


def compared(run: Run, step: int) -> tuple[Tensor, Renoised, AnyConditioning, Batch]:
    """The student's sample (B, ...) of a step, where it is compared, its conditioning, and the batch."""
    method: Any = run.method
    batch = batch_of(run, step)
    last = batch.draws.shared_integer("student_step", 0, len(method.sampler.grid))
    x0 = draw_sample(method.student, method.sampler, batch.draws, batch.shape, batch.conditioning, last)
    return x0, method.compared(x0.detach(), batch.draws, "matching"), batch.conditioning, batch


def float64_loss(x0: Tensor, away: Tensor, positive: Tensor, scale: float, x0_critic: Tensor) -> Tensor:
    """DMD's loss () in the words of its code, all but ``x0`` (B, ...) in float64."""
    x0_teacher = away + scale * (positive - away)
    near = (x0.detach().double() - x0_teacher).abs().flatten(1).mean(1)
    direction = torch.nan_to_num((x0_critic - x0_teacher) / near[:, None, None, None])
    return 0.5 * (x0.double() - (x0.double() - direction).detach()).square().mean()


_MEAN_FLOW = Case("", "mean_flow", {"steps": 4, "num_pairs": 16, "pair_steps": 2}, (3,))
_CENTRAL = Case("", "mean_flow", {**_MEAN_FLOW.settings, "derivative": "central"}, (3,))
_DMD2 = Case("", "dmd2", {"steps": 4}, (5,))
PAIRS = (
    Pair("MeanFlow, a quarter apart: FastGen's order", _MEAN_FLOW, mean_flow_twice),
    # A difference over 5e-3 makes rounding, which is another in a larger batch, a hundred times as large.
    Pair("MeanFlow by differences: mf-rae's stacked call", _CENTRAL, mean_flow_stacked, equal=2e-3),
    Pair("DMD2, the student's turn: FastGen's order, float64", _DMD2, dmd2_in_turn),
    Pair("DMD2, the student's turn: our order, DMD2's float64 chain", _DMD2, dmd2_in_float64),
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
    runs: list[Run] = []
    for place, pair in enumerate(pairs):
        run = next((one for one in runs if one.case is pair.case), None)
        if run is None:
            config = config_of(pair.case, folder / str(place), shape, cpu=device.type == "cpu")
            run = Run(pair.case, teacher, config)
            runs.append(run)
        (step,) = pair.case.steps
        difference = largest(ours(run, step), pair.theirs(run, step))
        works = {"ours": partial(ours, run, step), "theirs": partial(pair.theirs, run, step)}
        seconds = alternate(works, Clock(device), blocks)
        gain = ratios(seconds["theirs"], seconds["ours"])
        taken = {name: Spread.of([one * 1e3 for one in values]) for name, values in seconds.items()}
        if difference > pair.equal:
            table.failures.append(f"{pair.name}: gradients differ by {difference:.1e}, {pair.equal:.0e} is allowed")
        table.add(
            [pair.name, taken["ours"].words(0), taken["theirs"].words(0), f"{gain.words()} x", f"{difference:.1e}"],
            name=pair.name,
            ours_ms=vars(taken["ours"]),
            theirs_ms=vars(taken["theirs"]),
            gain=vars(gain),
            difference=difference,
        )
    table.notes += [
        "Both sides run on the same roles and draws, and take the derivative alike. Peak memory is not compared here."
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
