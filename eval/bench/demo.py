"""The demo's training, a few steps of it: milliseconds of a step by what they are spent on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fewstep.data.batch import Batch, Stream
from fewstep.eval.bench.runs import Case, Run
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, Spread
from fewstep.eval.demo import METHOD, recipe_of
from fewstep.programs.methods import method_class
from fewstep.programs.teacher import TeacherSettings, open_teacher
from fewstep.training.method import Order, Turn

TEACHER = "fashion-sd"
PARTS = ("batches", "rollout", "student", "teacher", "critic", "backward", "optimizer", "the rest")


def measure(device: torch.device, folder: Path, *, cycles: int = 2) -> Table:
    """Some cycles of the demo's recipe: from one update of the student to the next.

    Args:
        device: of the networks.
        folder: for files of the run.
        cycles: how many.
    """
    settings = yaml.safe_load(recipe_of(TEACHER).read_text(encoding="utf-8"))
    settings |= {"teacher": TEACHER, "data": "fashion", "out": str(folder), "report_to": "none", "log_steps": 10**6}
    config = method_class(METHOD).Config(**settings, cpu=device.type == "cpu")
    each, clock = config.critic_updates, Clock(device)
    run = Run(Case("demo", METHOD), open_teacher(TeacherSettings.of(config), device), config)
    parts = Parts(run, clock)
    for step in range(1, each):  # the first step of a run is logged
        run.play(step)
    found: dict[str, list[float]] = {name: [] for name in ("step", *PARTS)}
    for first in range(each, each * (1 + cycles), each):
        parts.seconds.clear()
        total = sum(clock(partial(run.play, step)) for step in range(first, first + each))
        found["step"].append(total * 1e3 / each)
        for name in PARTS[:-1]:
            found[name].append(parts.seconds[name] * 1e3 / each)
        found["the rest"].append(found["step"][-1] - sum(found[name][-1] for name in PARTS[:-1]))
    table = Table(
        f"The demo's training ({METHOD} on {TEACHER}): milliseconds of a step, mean of each {each}",
        ("part", "ms", "share"),
    )
    whole = Spread.of(found["step"]).median
    for name, values in found.items():
        spread = Spread.of(values)
        table.add([name, spread.words(1), f"{spread.median / whole:.1%}"], part=name, milliseconds=vars(spread))
    table.notes += [
        "batches: prompts, and real images read and encoded; rollout: the student without gradient; student, teacher, "
        "critic: their other passes forward, a GAN's features among the critic's; the rest: draws, losses, the loop.",
    ]
    return table


class Parts:
    """Seconds of a run by part, while its steps are played.

    Args:
        run: whose networks, backward passes and updates are timed.
        clock: by which.
    """

    def __init__(self, run: Run, clock: Clock) -> None:
        self.clock, self.seconds = clock, defaultdict[str, float](float)
        self._yielded = 0.0
        loop: Any = run.loop
        loop.batches = _Batches(run.batches, self)
        method: Any = run.method
        method.turns = partial(self._turns, method.turns)
        for name, role in run.method.roles.items():
            for expert in role.experts.values():
                expert.denoiser.on_call = partial(self._called, name)
        for optimizer in run.loop.optimizers.values():
            watched: Any = optimizer
            watched.update = partial(self._update, optimizer.update)

    def _called(self, role: str, _x_t: Tensor, _t: Tensor, _early: bool) -> Callable[[Tensor], None]:
        began = self.clock.now()
        name = "rollout" if role == "student" and not torch.is_grad_enabled() else role

        def answered(_answer: Tensor) -> None:
            self.seconds[name] += self.clock.now() - began

        return answered

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Do ``work``, whose seconds belong to a part."""
        began = self.clock.now()
        answer = work()
        self.seconds[name] += self.clock.now() - began
        return answer

    def _turns(self, turns: Any, step: int, batch: Batch) -> Iterator[Turn | Order]:
        for turn in turns(step, batch):
            self._yielded = self.clock.now()
            yield turn

    def _update(self, update: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Between a turn and its update there is nothing but the backward pass.
        self.seconds["backward"] += self.clock.now() - self._yielded
        norm: Tensor = self.timed("optimizer", partial(update, *args, **kwargs))
        return norm


class _Batches:
    """A run's batches, timed."""

    def __init__(self, batches: Stream, parts: Parts) -> None:
        self.batches, self.parts = batches, parts

    def micro_batch(self, *args: Any, **kwargs: Any) -> Batch:
        """As :meth:`fewstep.data.batch.Batches.micro_batch`."""
        made: Batch = self.parts.timed("batches", partial(self.batches.micro_batch, *args, **kwargs))
        return made
