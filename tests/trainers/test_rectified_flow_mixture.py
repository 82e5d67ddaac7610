"""Reflow straightens a teacher whose paths have a closed form, and one step of the student draws from its mixture."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, energy_distance, mixture_sample, spread_of
from toys import Labels, make_loop, role, unconditional

from fewstep.data.batch import Pairs
from fewstep.diffusion.draws import Draws, keyed_order
from fewstep.diffusion.ode import OdeSolver, straightness, teacher_times
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.roles import Role
from fewstep.trainers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fewstep.training.verdict import judged
from tests.training.loop_runs import rows

SCHEDULE = FlowSchedule()
TIMES = teacher_times(SCHEDULE, 50)


class InMemory:
    """Pairs of the exact teacher."""

    def __init__(self, teacher, count: int) -> None:
        self.noise = Draws(0, 0, range(count)).normal("noise", (2,))
        with torch.no_grad():
            self.x0 = OdeSolver(teacher, SCHEDULE, "heun").to_data(self.noise, TIMES[::2], unconditional(count))

    def batch(self, seed: int, positions: Sequence[int]) -> Pairs:
        rows = [keyed_order(seed, "pairs", len(self.x0), position) for position in positions]
        return Pairs(self.x0[rows], self.noise[rows], unconditional(len(rows)))


def trained(out: Path, **settings) -> RectifiedFlow:
    """The trainer's class after a run in the real loop, on pairs of the mixture's exact teacher."""
    torch.manual_seed(0)
    networks = {"teacher": MixtureTeacher(), "student": MixtureTeacher()}
    roles = {name: role(name, net, SCHEDULE, "sample", name == "student") for name, net in networks.items()}
    defaults = {"report_to": "none", "sample_steps": 0, "log_steps": 1000, "checkpointing_steps": 5000}
    config = RectifiedFlowConfig(teacher="mixture", out=str(out), batch_size=64, **(defaults | settings))
    method = RectifiedFlow(config, roles, Sampler(SCHEDULE, (1.0,), "ode"))
    data = {"conditions": Labels(None), "pairs": InMemory(roles["teacher"], 4096)}
    make_loop(method, config, (2,), **data, on_samples=spread_of(method)).run()
    return method


@torch.no_grad()
def distance(who: Role, steps: int) -> float:
    """Of 3,000 samples from 3,000 of the mixture itself; two of those are 0.003 apart."""
    noise = Draws(1, 0, range(3000)).normal("noise", (2,))
    sampler = Sampler(SCHEDULE, tuple(teacher_times(SCHEDULE, steps)), "ode")
    return energy_distance(rollout(who, sampler, noise, unconditional(3000)), mixture_sample(3000, 1))


def bend(who: Role) -> float:
    return float(
        straightness(who, SCHEDULE, TIMES, Draws(1, 0, range(3000)).normal("noise", (2,)), unconditional(3000))
    )


@pytest.mark.soak
def test_reflow_straightens_the_paths_and_keeps_where_they_lead(tmp_path: Path):
    method = trained(tmp_path, max_steps=2500, lr=5e-3)
    teacher, student = method.roles["teacher"], method.student
    assert bend(teacher) > 0.7
    assert bend(student) < 0.3  # 0.23 here
    assert distance(student, 50) < 0.02
    for steps, before, after in ((1, 1.5, 0.25), (2, 0.2, 0.04), (4, 0.03, 0.01)):  # 0.17, 0.016, 0.005 here
        assert distance(teacher, steps) > before
        assert distance(student, steps) < after


def test_distillation_to_one_step_draws_from_the_mixture(tmp_path: Path):
    student = trained(tmp_path, max_steps=1000, lr=1e-2, times="grid").student
    assert distance(student, 1) < 0.015  # 0.005 here


@pytest.mark.parametrize(
    ("times", "lr"),
    [
        ("u_shaped", 1e-3),
        pytest.param("u_shaped", 2e-2, marks=pytest.mark.soak),
        pytest.param("grid", 5e-3, marks=pytest.mark.soak),
    ],
)
def test_a_healthy_run_raises_no_alarm(times: str, lr: float, tmp_path: Path):
    """In one step its student begins with the mean of all, and stays there for 1,000 steps before it spreads."""
    trained(tmp_path, max_steps=100, lr=lr, times=times, log_steps=1, sample_steps=5)
    log = rows(tmp_path)
    assert sum("samples/apart" in row for row in log) == 20
    assert [trouble.words for trouble, _ in judged(log)] == []
