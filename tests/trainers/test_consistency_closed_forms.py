"""Consistency where the answer is known: a Gaussian teacher's closed form, and the trajectory's end."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import Labels, labels, make_loop, role, unconditional

from fewstep.data.batch import Real
from fewstep.diffusion.discretization import EvenTimes, SigmaRange
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Consistency, ConsistencyConfig
from tests.trainers.toy_consistency import GRID, config, vector_method


class Gaussian(nn.Module):
    """The exact x0 under flow matching of data of standard deviation S."""

    S = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))  # whose dtype a denoiser asks for

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        t = (timestep / 1000).reshape(-1, 1).to(x.dtype)
        return self.S**2 * (1 - t) / ((1 - t) ** 2 * self.S**2 + t**2) * x


class Gains(nn.Module):
    """A student that multiplies x_t with a number of its own at each time of a grid."""

    def __init__(self, times: Tensor, gains: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.gains = nn.Parameter(gains.clone())

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        place = (timestep.reshape(-1, 1) / 1000 - self.times).abs().argmin(1)
        return self.gains[place].reshape(-1, 1).to(x.dtype) * x


def closed_form(times: Tensor) -> Tensor:
    """What f multiplies x_t with at each grid time when it is consistent along the teacher's Euler steps."""
    gains = [torch.ones((), dtype=torch.float64)]
    for r, t in pairwise(times):
        x0 = Gaussian.S**2 * (1 - t) / ((1 - t) ** 2 * Gaussian.S**2 + t**2)
        gains.append(gains[-1] * ((1 - r) * x0 + r * (1 - (1 - t) * x0) / t))
    return torch.stack(gains)


def gaussian_method(settings: ConsistencyConfig, start: Tensor | None = None) -> Consistency:
    settings, schedule = settings.resolved(), FlowSchedule()
    discretization = EvenTimes(SigmaRange(schedule), [settings.intervals + 1])
    times = discretization.times(0)
    roles = {"teacher": role("teacher", Gaussian(), schedule, "sample", trainable=False)}
    for name in ("student", "target"):
        network = Gains(times, torch.ones_like(times) if start is None else start)
        roles[name] = role(name, network, schedule, "sample", trainable=name == "student")
    teacher = GuidedDenoiser(roles["teacher"], 1.0, further=0)
    boundary = settings.make_boundary(discretization.levels, None)
    return Consistency(settings, roles, teacher, Sampler(schedule, GRID, "fresh"), discretization, boundary)


def test_the_flow_lcm_of_a_gaussian_teacher_has_its_closed_form_as_a_fixed_point(tmp_path: Path):
    settings = config(tmp_path, intervals=50, distance="mse")
    times = gaussian_method(settings).discretization.times(0)
    method = gaussian_method(settings, closed_form(times))
    x0, noise = torch.randn(2, 50, 6, dtype=torch.float64)
    pair = method.discretization.neighbours(times, torch.arange(50))
    seen = method.compare(x0, noise, pair, unconditional(50))
    torch.testing.assert_close(seen.f, seen.target, rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.grad(method.distance(seen).mean(), method.student.parameters())[0]
    assert gradient.abs().max() < 1e-10
    # Fifty Euler steps come close to the flow's own map, x_t S / S(t), which at t = 1 is S.
    assert closed_form(times)[-1].item() == pytest.approx(Gaussian.S, rel=0.04)


def test_the_flow_lcm_of_a_gaussian_teacher_comes_to_its_closed_form(tmp_path: Path):
    settings = config(tmp_path, intervals=6, distance="mse", lr=0.03, max_steps=250, batch_size=32, data="numbers")
    method = gaussian_method(settings)
    expected = closed_form(method.discretization.times(0))
    assert (method.student.denoiser.network.gains - expected).abs().max() > 0.4

    class Real16:
        def batch(self, seed: int, positions: Sequence[int]) -> Real:
            return Real(Gaussian.S * Draws(9, 0, positions).normal("x", (16,)), unconditional(len(positions)))

    make_loop(method, settings, (16,), conditions=Labels(None), real=Real16()).run()
    gains = method.student.denoiser.network.gains[1:]  # at the boundary f is x whatever the network says
    torch.testing.assert_close(gains.detach(), expected[1:], rtol=0, atol=0.02)


def test_a_clean_neighbour_is_where_the_trajectory_ends(tmp_path: Path):
    """With the same noise that is the real sample; with the teacher's step, what the teacher says."""
    for solver in ("none", "euler"):
        method = vector_method(config(tmp_path, "ect", solver=solver))
        pair = method.discretization.neighbours(torch.zeros(4), stage=0)
        assert (pair.sigma_r == 0).all()
        x0, noise = torch.randn(2, 4, 6)
        seen = method.compare(x0, noise, pair, labels([0, 1, 2, 3]))
        assert torch.equal(seen.target, seen.x_r)
        assert torch.equal(seen.target, x0) == (solver == "none")
