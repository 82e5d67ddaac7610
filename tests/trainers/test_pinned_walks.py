"""Samples of which a pipeline pins a part: in every method's own walks the picture is put back under the first noise.

The schedule is a table, whose first sample is all noise though its alpha is not 0 there.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TABLE, labels, unconditional

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import Pins, as_beside, with_outside
from fewstep.conditioning.ragged import AnyConditioning
from fewstep.critic.first_step import TeacherStart
from fewstep.critic.off_trajectory import OffTrajectory, Walked
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.pinned import pinned_clean
from fewstep.diffusion.prediction import add_noise, expand, ode_step
from fewstep.diffusion.renoising import Renoiser
from fewstep.diffusion.schedule import NoiseSchedule, TableSchedule
from fewstep.diffusion.windows import Window
from fewstep.networks.roles import NetworkRole
from tests.trainers import (
    test_flash_dmd_preferences,
    test_free_flow,
    test_perflow,
    test_speed_up_net,
    toy_phased_dmd,
    toy_speed_up_net,
)

B = 4
#: Its alpha is a third at the top.
THIRD = TableSchedule(torch.linspace(1 - 1e-4, 1 - 4e-3, 1000, dtype=torch.float64).cumprod(0))


def pinned(told: Conditioning, size: int = 6) -> tuple[Conditioning, Pins]:
    """The same samples, of each of which the first two entries are pinned."""
    where = torch.zeros(B, size, dtype=torch.bool)
    where[:, :2] = True
    pins = Pins(where, torch.arange(1.0, B * size + 1).reshape(B, size) / 7)
    both = with_outside(told, pins, None)
    return Conditioning(both.tree, B, [as_beside(both, other) for other in told.others]), pins


def batch(told: Conditioning) -> Batch:
    return Batch(B, (6,), told, Draws(0, 0, range(B)), None, False)


def noise() -> Tensor:
    """The first one of a walk, as :func:`batch` draws it."""
    return Draws(0, 0, range(B)).normal("noise", (6,))


def assert_pinned(x: Tensor, t: Tensor, pins: Pins, noise: Tensor, schedule: NoiseSchedule) -> None:
    wanted = add_noise(pins.value.to(x), noise.to(x), schedule.coefficients(t))
    torch.testing.assert_close(x[pins.where], wanted[pins.where], rtol=1e-5, atol=1e-5)


class Noted:
    """What a role's network is asked: (x_t, t) of each call."""

    def __init__(self, role: NetworkRole) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        role.denoiser.on_call = self._note

    def _note(self, x_t: Tensor, t: Tensor, _early: bool):
        self.calls.append((x_t.detach().clone(), t))
        return lambda _answer: None


def reading(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
    """A denoiser that reads all entries for each of them."""
    return pinned_clean(conditioning, torch.tanh(x_t + x_t.mean(1, keepdim=True) + expand(t, x_t)))


def at(t: float) -> Tensor:
    return torch.full((B,), t, dtype=torch.float64)


def test_the_path_that_teaches_a_first_step():
    told, pins = pinned(unconditional(B))
    first = torch.randn(B, 6, dtype=torch.float64)
    times = (1.0, 0.7, 0.4)
    start, x = TeacherStart(reading, THIRD, times), first
    for now, then in pairwise(times):
        there = THIRD.coefficients(at(then))
        x = ode_step(x, reading(x, at(now), told), THIRD.coefficients(at(now)), there)
        x = torch.where(pins.where, add_noise(pins.value.double(), first, there), x)
    end = start.end(first, told)
    torch.testing.assert_close(end, x, rtol=1e-10, atol=1e-10)
    assert_pinned(end, at(0.4), pins, first, THIRD)
    whole = TeacherStart(reading, THIRD, (1.0, 0.4, 0.0)).end(first, told)
    torch.testing.assert_close(whole[pins.where], pins.value[pins.where].double())
    # No loss of what is pinned.
    x0 = reading(first, at(1.0), told)
    alpha, sigma = THIRD.coefficients(at(1.0))
    tau = sigma / (alpha + sigma)
    own = (first / expand(alpha + sigma, first) - x0) / expand(tau, first)
    velocity = start.velocity(first, end, told)
    free = ((own - velocity)[~pins.where]).square().sum() / first.numel()
    torch.testing.assert_close(start.loss(first, x0, velocity), free, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["extrapolated", "renoised"])
def test_a_point_beside_the_walk(where: str):
    told, pins = pinned(unconditional(B))
    asked = list[tuple[Tensor, Tensor]]()

    def student(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        asked.append((x_t, t))
        return reading(x_t, t, conditioning)

    beside = OffTrajectory(student, reading, reading, Renoiser(THIRD, 0.1, 0.9), where, "independent", 0.1)
    beside(Walked(noise(), at(1.0), reading(noise(), at(1.0), told), 1.0), batch(told))
    ((x, t),) = asked
    assert_pinned(x, t, pins, noise(), THIRD)


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
def test_where_a_phase_ends(tmp_path: Path, renoise: str):
    told, pins = pinned(labels([0.0] * B))
    trained = toy_phased_dmd.method(toy_phased_dmd.config(tmp_path, renoise=renoise), "epsilon")
    phase = trained.phases[0]
    assert phase.anchor is not None
    x_s = trained.arrive(reading(noise(), at(1.0), told), noise(), 0, phase, batch(told))
    assert_pinned(x_s, at(phase.anchor), pins, noise(), trained.sampler.schedule)


@pytest.mark.parametrize(("schedule", "kind"), [(None, "flow"), (THIRD, "epsilon")])
def test_the_successors_of_a_noisy_step(tmp_path: Path, schedule: NoiseSchedule | None, kind: str):
    told, pins = pinned(labels([0.0] * B))
    trained = test_flash_dmd_preferences.preferring(tmp_path, schedule, kind, reward_start_step=0)
    assert trained.rewards is not None
    noted, places = Noted(trained.roles["student"]), set()
    for step in range(4):
        draws = Draws(0, step, range(B))
        trained.preference_turn(trained.rewards, 0, replace(batch(told), draws=draws))
        places.add(Draws(0, step, range(B)).shared_integer("student_step", 0, 2))
        assert len(noted.calls) >= 1 + trained.config.preference_candidates
        first = Draws(0, step, range(B)).normal("noise", (6,))
        assert torch.equal(noted.calls[0][0], first)
        for x, t in noted.calls[1:]:
            assert_pinned(x, t, pins, first, trained.sampler.schedule)
        noted.calls.clear()
    assert places == {0, 1}


def test_a_window_of_perflow():
    told, pins = pinned(labels([0.0] * B))
    trained = test_perflow.method("epsilon")
    noted = Noted(trained.roles["teacher"])
    with torch.no_grad():
        x = trained.walk(noise(), [at(1.0), at(0.9)], [at(0.9), at(0.8)], told, noise())
    assert_pinned(x, at(0.8), pins, noise(), TABLE)
    assert_pinned(noted.calls[1][0][:B], at(0.9), pins, noise(), TABLE)


def test_a_window_of_speed_up_net(tmp_path: Path):
    tokens = toy_speed_up_net.tokens
    told, pins = pinned(tokens([0] * B), toy_speed_up_net.D)
    trained = toy_speed_up_net.method(test_speed_up_net.config(tmp_path), TABLE, "epsilon")
    first = torch.randn(B, toy_speed_up_net.D)
    _, x = trained.walk(first, Window(at(1.0), at(0.5)), told.alone(), told.others[0], first)
    assert_pinned(x, at(0.5), pins, first, TABLE)


def test_a_step_of_free_flow():
    told, pins = pinned(labels([0.0] * B))
    trained = test_free_flow.vectors(test_free_flow.config(), "table")
    noted = Noted(trained.roles["teacher"])
    trained.prediction(noise() * trained.schedule.initial_scale(), at(1.0), told, at(0.5))
    ((x, t),) = noted.calls
    assert_pinned(x, t, pins, noise(), trained.schedule)
