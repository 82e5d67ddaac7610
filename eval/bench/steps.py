"""Whole training steps of every method, in forward passes: what they cost in arithmetic, and what they take in time.

A unit F is one forward pass of the network without gradient, for one sample. The target: a step takes no more than
1.05 times the time that its arithmetic would take at the speed of such a pass, and its optimizer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.draws import Draws
from fewstep.eval.bench.replay import Replay
from fewstep.eval.bench.runs import Case, Run, config_of, open_shape
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, Spread
from fewstep.eval.memory.shapes import SHAPES
from fewstep.programs.teacher import Teacher

TARGET = 1.05
SHAPE = "small_unet"
#: Steps of four; the teacher is guided. Where a period is given, it is played as a whole.
CASES = (
    Case("dmd2, no GAN, 5 steps", "dmd2", {"steps": 4}, range(5, 10)),
    Case("the same, LoRA of rank 8", "dmd2", {"steps": 4, "lora_rank": 8}, range(5, 10)),
    Case("consistency (lcm), data-free, 2 steps", "consistency", {"steps": 4, "variant": "lcm"}, (1, 2)),
    Case("sid, guided, 1 step", "sid", {"steps": 4}, (1,)),
    Case("phased_dmd, one step of each kind", "phased_dmd", {"steps": 4}, (505, 506)),
    Case("mean_flow, a quarter apart, 2 steps", "mean_flow", {"steps": 4, "num_pairs": 16, "pair_steps": 2}, (1, 2)),
    Case("rectified_flow, 2 steps", "rectified_flow", {"steps": 4, "num_pairs": 16, "pair_steps": 2}, (1, 2)),
)


@dataclass(frozen=True)
class Measured:
    """Of one case, in F; ``networks`` is None where the calls cannot be played alone."""

    case: Case
    flops: float
    seconds: Spread
    networks: Spread | None
    optimizer: Spread
    ratio: Spread


def measure(
    device: torch.device,
    folder: Path,
    *,
    blocks: int = 3,
    budget: float = 600.0,
    cases: Sequence[Case] = CASES,
    shape: str = SHAPE,
) -> Table:
    """All cases, in blocks whose order is turned round.

    Args:
        device: of the networks.
        folder: for files of runs.
        blocks: of every case.
        budget: seconds after which no further block begins.
        cases: which.
        shape: of the network.
    """
    table = Table(
        f"Training steps in F; target: time at most {TARGET} x (arithmetic + optimizer)",
        ("method", "arithmetic", "networks alone", "optimizer", "the rest", "time", "time / (arithmetic + optimizer)"),
    )
    for one in measure_cases(device, folder, blocks, budget, cases, shape):
        known = 0.0 if one.networks is None else one.networks.median
        rest = one.seconds.median - known - one.optimizer.median
        table.add(
            [
                one.case.name,
                f"{one.flops:.2f}",
                "-" if one.networks is None else one.networks.words(),
                one.optimizer.words(),
                "-" if one.networks is None else f"{rest:.2f}",
                one.seconds.words(),
                one.ratio.words(),
            ],
            **asdict(one) | {"rest": None if one.networks is None else rest},
            target=TARGET,
            reached=one.ratio.median <= TARGET,
        )
    table.notes += [
        "UNet of 9 M parameters at 16 x 16 latents, batch 8; medians of blocks, least and greatest in brackets.",
        "networks alone: the calls of these steps and their backward passes, with nothing around them; calls that "
        "carry a tangent are not played alone. the rest: method, loop, batches.",
    ]
    return table


def measure_cases(
    device: torch.device, folder: Path, blocks: int, budget: float, cases: Sequence[Case], shape: str
) -> list[Measured]:
    """As :func:`measure`, as numbers."""
    teacher = open_shape(shape, folder, device)
    began = time.perf_counter()
    unit = Unit(teacher, Clock(device), SHAPES[shape].batch_size)
    timed = [
        _Timed(Run(case, teacher, config_of(case, folder / str(place), shape, cpu=device.type == "cpu")), unit)
        for place, case in enumerate(cases)
    ]
    for block in range(blocks):
        if block and time.perf_counter() - began > budget:
            break
        for one in timed if block % 2 == 0 else timed[::-1]:
            one.block()
    return [one.measured() for one in timed]


class Unit:
    """F: a pass of the teacher's network without gradient, a batch at once."""

    def __init__(self, teacher: Teacher, clock: Clock, size: int) -> None:
        recording = teacher.recording
        self.clock, self.network = clock, recording.network.eval()
        draws = Draws(0, 0, range(size), next(self.network.parameters()).device)
        x_t, t = draws.normal("unit", recording.sample_shape), draws.uniform("time")
        conditioning = Conditioning(recording.marked, 1).select([0] * size).to(device=x_t.device)
        timestep = recording.schedule.timestep(t)

        def forward() -> Tensor:
            with torch.no_grad():
                return recording.recipe.call(self.network, x_t, timestep, conditioning)

        self.forward = forward
        forward()
        self.flops = flops(forward)

    def seconds(self) -> float:
        """That one such pass takes now."""
        return self.clock(self.forward)

    def in_units(self, works: Sequence[Callable[[], object]]) -> float:
        """How many such passes all ``works`` together take as long as, each beside those just before and after it."""
        total, before = 0.0, self.seconds()
        for work in works:
            taken, after = self.clock(work), self.seconds()
            total += 2 * taken / (before + after)
            before = after
        return total


class _Timed:
    """A case with what was measured of it so far."""

    def __init__(self, run: Run, unit: Unit) -> None:
        self.run, self.unit = run, unit
        found: list[Replay] = []
        self.flops = flops(lambda: found.append(Replay(run))) / unit.flops  # which is also the warm-up
        self.replay, self.updates = found[0], Updates(run, found[0])
        self.taken: dict[str, list[float]] = {"seconds": [], "networks": [], "optimizer": []}

    def block(self) -> None:
        steps = self.run.case.steps
        self.taken["seconds"].append(self.unit.in_units([partial(self.run.play, step) for step in steps]))
        if self.replay.possible:
            self.taken["networks"].append(self.unit.in_units([partial(self.replay.play, step) for step in steps]))
        self.updates.fill()
        self.taken["optimizer"].append(self.unit.in_units([partial(self.updates.play, step) for step in steps]))

    def measured(self) -> Measured:
        seconds, networks, optimizer = self.taken.values()
        ratio = [taken / (self.flops + part) for taken, part in zip(seconds, optimizer)]
        return Measured(
            self.run.case,
            self.flops,
            Spread.of(seconds),
            Spread.of(networks) if networks else None,
            Spread.of(optimizer),
            Spread.of(ratio),
        )


class Updates:
    """The optimizer's part of a run's steps, alone: gradients of the right shapes lie ready."""

    def __init__(self, run: Run, replay: Replay) -> None:
        self.loop, self.turns = run.loop, replay.turns
        self.gradients: dict[str, list[Tensor]] = {}

    def fill(self) -> None:
        """Have a gradient for every parameter."""
        for role, optimizer in self.loop.optimizers.items():
            self.gradients[role] = [torch.full_like(leaf, 1e-3) for leaf in optimizer.held.leaves]

    def play(self, step: int) -> None:
        """The updates of a step."""
        for role in self.turns[step]:
            optimizer = self.loop.optimizers[role]
            for leaf, gradient in zip(optimizer.held.leaves, self.gradients[role], strict=True):
                leaf.grad = gradient
            optimizer.update(step)


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of ``work``: matrix products, convolutions and attention, forward and backward."""
    # Some attention kernels are in no counter's table, the closed form is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
