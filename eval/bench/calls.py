"""Network calls and arithmetic of every method against their floors, on stand-ins and on small real networks.

Each recipe that ships, and each variant in the list of `make methods`, is played for the steps of one update of the
student. Its calls must be those that were worked out by hand (:mod:`.floors`), and these no more than the paper's
formula where there is one. The same steps are then played on a real network of the teacher's family, forward and
backward, and the floating-point operations must be those of the calls.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files

import torch
import yaml

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.eval.bench.floors import declared
from fewstep.eval.bench.formulas import drawn, formula, period
from fewstep.eval.bench.steps import flops
from fewstep.eval.bench.table import Table
from fewstep.eval.benchmark.cells import read_plan
from fewstep.fashion import TEACHERS, teacher_path
from fewstep.networks.make_roles import RoleSettings
from fewstep.programs.methods import method_class, methods
from fewstep.programs.planning.call_counts import CallCounter, Calls, forward_passes
from fewstep.programs.planning.counting import CountedDraws
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.stand_in import stand_in
from fewstep.recording import Recording, record
from fewstep.teachers.loading import load_teacher
from fewstep.training.method import Method

#: A recipe costs more than its floor for one of these reasons, in words, or it is a failure.
REASONS: Mapping[str, str] = {}
#: Arithmetic beyond that of the calls: heads, second times, and attention's products, which a tangent has thrice.
ALLOWED = 1.05
_SIZE = 2


@dataclass(frozen=True)
class Recipe:
    """A method with settings, and the embedded teacher that stands for the family it is meant for.

    Attributes:
        name: of its file, or in the list of methods.
        method: its name.
        teacher: an embedded one.
        config: of the run.
    """

    name: str
    method: str
    teacher: str
    config: RunConfig

    @property
    def plain(self) -> RunConfig:
        """The run with two samples in a batch, and without what changes no call and takes time."""
        rank = min(4, self.config.lora_rank)
        return replace(
            self.config,
            batch_size=_SIZE,
            lora_rank=rank,
            mixed_precision="no",
            gradient_checkpointing=False,
            gradient_accumulation_steps=1,
            ema_decay=0.0,
            cpu=True,
        )


@dataclass(frozen=True)
class Counted:
    """What a recipe's steps cost in one update of the student, in F.

    Attributes:
        calls: counted.
        floor: worked out by hand, for the same walks of the student.
        drawn: of it what is up to chance.
        words: the paper's formula without that, None where there is none; paper: its value.
        paper: see words.
        arithmetic: measured over that of a forward pass of one sample.
        expected: the arithmetic of the calls.
    """

    calls: float
    floor: float
    drawn: float
    words: str | None
    paper: float | None
    arithmetic: float
    expected: float

    def faults(self, same: bool) -> Iterator[str]:
        """What is above its floor; ``same``: whether calls were the declared ones, role by role."""
        if not same:
            yield f"its calls cost {self.calls:.2f} F and not as declared, {self.floor:.2f} F"
        if self.paper is not None and self.calls - self.drawn > self.paper + 1e-6:
            yield f"it costs {self.calls - self.drawn:.2f} F without what is drawn, its formula {self.paper:.2f} F"
        if self.arithmetic > ALLOWED * self.expected:
            yield f"its arithmetic is {self.arithmetic:.2f} F, that of its calls {self.expected:.2f} F"


def recipes() -> list[Recipe]:
    """Those of ``trainers/configs/`` for teachers of others, and all variants of the list of methods."""
    found = []
    for path in sorted((files("fewstep.trainers") / "configs").iterdir(), key=lambda path: path.name):
        name, text = path.name.removesuffix(".yaml"), path.read_text(encoding="utf-8")
        if "fashion" in name:
            continue
        method = max((method for method in methods() if name.startswith(method)), key=len)
        settings = yaml.safe_load(text)
        launch = "".join(line for line in text.splitlines() if line.startswith("#   "))
        has_head = settings.get("gan_weight") or settings.get("f_divergence")
        if has_head or (method != "dmd2" and "--data " in launch):
            settings["data"] = "fashion"
        teacher = "fashion-flow" if re.search("flow$|sd3|wan", name) else "fashion-sd"
        found.append(Recipe(name, method, teacher, method_class(method).Config(teacher=teacher, out="", **settings)))
    listed: dict[str, Recipe] = {}
    for training in sorted(read_plan().trainings, key=lambda training: training.steps):
        title = f"{training.name}, {training.teacher}"  # of several students the one of most steps
        listed[title] = Recipe(title, training.method, training.teacher, training.config(0))
    return found + list(listed.values())


def measure(chosen: list[Recipe] | None = None) -> Table:
    """The table of all recipes; what is above its floor without a reason is among its failures."""
    table = Table(
        "Network calls and arithmetic of one student update in F, against the floor",
        ("recipe", "calls", "of them drawn", "floor", "formula without that", "arithmetic", "of the calls", ""),
    )
    teachers: dict[str, Recording] = {}
    for recipe in recipes() if chosen is None else chosen:
        if recipe.teacher not in teachers:
            teachers[recipe.teacher] = recording_of(recipe.teacher)
        one, same = count(recipe, teachers[recipe.teacher])
        faults = list(one.faults(same))
        reason = REASONS.get(recipe.name)
        if faults and reason is None:
            table.failures += [f"{recipe.name}: {fault}" for fault in faults]
        verdict = (f"above: {reason}" if reason else "ABOVE") if faults else "at its floor"
        numbers = (f"{value:.2f}" for value in (one.calls, one.drawn, one.floor))
        shown = "derived" if one.words is None else f"{one.words} = {one.paper:.2f}"
        table.add(
            [recipe.name, *numbers, shown, f"{one.arithmetic:.2f}", f"{one.expected:.2f}", verdict],
            **vars(one) | {"name": recipe.name, "method": recipe.method, "faults": faults, "reason": reason},
        )
    table.notes += [
        "F: a forward pass of one sample. Guided pairs are two; passes to a GAN's tap are counted by their share. "
        "drawn: the student's earlier steps and samples, and samples of two times beyond their share. derived: the "
        "paper gives no more than the derivation in eval/bench/floors.py.",
    ]
    return table


def recording_of(teacher: str) -> Recording:
    """An embedded teacher, recorded."""
    pipeline = load_teacher(str(teacher_path(teacher)))
    pipeline.set_progress_bar_config(disable=True)
    return record(pipeline, guidance_scale=TEACHERS[teacher].guidance_scale)


def count(recipe: Recipe, recording: Recording) -> tuple[Counted, bool]:
    """What a recipe costs, and whether each role's calls are those that were declared."""
    config = recipe.plain
    stood = DryRun(config, recipe.method, stand_in(recording), roles=RoleSettings())
    standing = stood.prepare()
    # Near the end of a run: what rises or falls in the course of it has done so.
    each, last = period(standing), config.max_steps - 1
    counter, _ = _played(stood, standing, range(last - 2 * each, last))
    first = next(step for step in counter.steps if _trained(counter, step))
    steps = range(first, first + each)

    real = DryRun(config, recipe.method, recording)
    method = real.prepare()
    shares = _Shares(real, method)
    # The student's update and one more of the critic have the arithmetic of all.
    on_real, operations = _played(real, method, steps[:2])
    calls = floor = chance = 0.0
    same = True
    for step in steps:
        counted, wanted = counter.calls(step), declared(standing, step, stood.batch(step, CountedDraws))
        calls += forward_passes(counted, shares.features)
        floor += forward_passes(wanted, shares.features)
        chance += drawn(standing, step, stood.batch(step, CountedDraws))
        same = same and _same(counted, wanted)
    expected = 0.0
    for step in steps[:2]:
        expected += sum(_cost(name, one, shares) for name, one in on_real.calls(step).items())
        same = same and _same(on_real.calls(step), counter.calls(step))
    words, paper = formula(standing, shares.features) or (None, None)
    return Counted(calls, floor, chance, words, paper, operations / shares.unit / _SIZE, expected), same


def _trained(counter: CallCounter, step: int) -> bool:
    """Whether the student is updated in a step."""
    own = counter.calls(step)["student"]
    return own.to_parameters + own.jvp_to_parameters > 0


def _played(dry_run: DryRun, method: Method, steps: Sequence[int]) -> tuple[CallCounter, int]:
    """The steps, counted: calls, and floating-point operations."""

    def play() -> None:
        for step in steps:
            dry_run.play(method, step, CountedDraws)

    with CallCounter(method) as counter:
        operations = flops(play)
    return counter, operations


def _same(one: Mapping[str, Calls], other: Mapping[str, Calls]) -> bool:
    """Whether calls agree role by role, as far as sums of shares of a batch do."""
    return one.keys() == other.keys() and all(
        math.isclose(count, vars(other[name])[kind], abs_tol=1e-9)
        for name, calls in one.items()
        for kind, count in vars(calls).items()
    )


class _Shares:
    """What a pass of each role costs, measured in a pass of the stock network."""

    def __init__(self, dry_run: DryRun, method: Method) -> None:
        recording, batch = dry_run.recording, dry_run.batch(0)
        x_t, t = batch.draws.normal("unit", batch.shape), batch.draws.uniform("time")
        told, time = batch.conditioning, recording.schedule.timestep(t)
        assert isinstance(told, Conditioning)
        with torch.no_grad():
            #: Floating-point operations of one sample.
            self.unit = flops(lambda: recording.recipe.call(recording.network, x_t, time, told)) / _SIZE
            #: Of roles that are adapters.
            self.adapted = {
                name: flops(partial(role.denoiser.raw, x_t, t, told)) / _SIZE / self.unit
                for name, role in method.roles.items()
                if role.is_adapter and role.parameters()
            }
            critic = method.roles.get("critic")
            #: h, of the teacher's kind of network.
            self.features = 1.0
            if critic is not None:
                tapped = flops(partial(critic.denoiser.features, x_t, t, told, dry_run.tap(critic)))
                self.features = tapped / _SIZE / self.unit / self.adapted.get("critic", 1.0)


def _cost(name: str, calls: Calls, shares: _Shares) -> float:
    """The arithmetic of a role's calls in F, of full copies or of adapters.

    An adapter's backward pass goes through the frozen layers to their inputs alone, 1 F, and through its own product
    both ways.
    """
    plain = {name: calls}
    role = name.removesuffix("/features")
    if role not in shares.adapted:
        return forward_passes(plain, shares.features)
    more = shares.adapted[role] - 1
    total = (calls.no_grad + calls.jvp) * (1 + more) + calls.jvp * (1 + more) + calls.to_inputs * (2 + 2 * more)
    total += calls.to_parameters * (2 + 3 * more) + calls.jvp_to_parameters * (3 + 4 * more)
    return total * (shares.features if name.endswith("/features") else 1.0)
