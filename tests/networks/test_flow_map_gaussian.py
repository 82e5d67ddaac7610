"""Average velocities with a closed form: the flow map of a Gaussian, in every schedule and prediction type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.prediction import ode_step, to_velocity
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from tests.networks.second_times import SCHEDULES


class Gaussian(nn.Module):
    """The exact average velocity of data of standard deviation s, in any prediction type that is asked for."""

    S = 0.7
    gap: Tensor

    def __init__(self, schedule: NoiseSchedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.nothing = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_in: Tensor, t: Tensor) -> Tensor:
        from fewstep.diffusion.prediction import expand, velocity_map

        x_t = x_in / expand(self.schedule.input_scale(t), x_in)
        alpha, sigma = self.schedule.coefficients(t)
        tau = sigma / (alpha + sigma)
        rho = tau - self.gap
        # On the flow of a Gaussian, samples keep their quantiles: y_rho = y_tau S(rho) / S(tau).
        spread = ((1 - tau) ** 2 * self.S**2 + tau**2).sqrt()
        ratio = ((1 - rho) ** 2 * self.S**2 + rho**2).sqrt() / spread
        own = (tau - (1 - tau) * self.S**2) / spread**2
        apart = self.gap > 1e-9
        u = torch.where(apart, (1 - ratio) / torch.where(apart, self.gap, 1.0), own)
        velocity = expand(u / (alpha + sigma), x_t) * x_t + 0 * self.nothing
        skip, out = velocity_map(self.kind, self.schedule, t)
        return (velocity - expand(skip, x_t) * x_t) * expand(1 / out, x_t)


class Told2(nn.Module):
    from contextlib import contextmanager

    def end(self, _time: object, following: object) -> object:
        return following

    @contextmanager
    def on(self, network: Gaussian, gap: Any) -> Any:
        network.gap = gap()
        yield


class TimestepRecipe:
    unread = None

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, self.schedule.time(timestep))


def gaussian(schedule: NoiseSchedule, kind: str) -> FlowMapDenoiser:
    base = NetworkDenoiser(Gaussian(schedule, kind), TimestepRecipe(schedule), schedule, kind)
    return FlowMapDenoiser(base, Told2())


KINDS = [("flow", "flow"), ("table", "epsilon"), ("table", "v_prediction"), ("table", "sample"), ("edm", "edm")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_mean_flow_identity_holds_on_a_gaussian(name: str, kind: str):
    """u = v - (t - r) du/dt along v, at every two times, in every schedule and prediction type."""
    schedule = SCHEDULES[name]
    student = gaussian(schedule, kind)
    tau, rho = torch.tensor([[0.9, 0.7, 0.5], [0.1, 0.4, 0.3]], dtype=torch.float64)
    t, r = (schedule.time_from_flow_time(value) for value in (tau, rho))
    nothing = Conditioning({}, 3)
    x_t = torch.randn(3, 4, dtype=torch.float64)
    velocity = student.velocity(x_t, t, nothing, t).detach()
    _, change = student.velocity_and_derivative(x_t, t, nothing, r, velocity)
    u = student.velocity(x_t, t, nothing, r)
    torch.testing.assert_close(u, velocity - gap(schedule, t, r)[:, None] * change, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_any_number_of_steps_lead_to_the_same_sample(name: str, kind: str):
    schedule = SCHEDULES[name]
    student = gaussian(schedule, kind)
    top = torch.full((2,), 0.9, dtype=torch.float64)
    ends = []
    for times in ((0.9,), (0.9, 0.5), (0.9, 0.6, 0.4, 0.2)):
        x = torch.tensor([[1.0, -2.0], [0.3, 0.7]], dtype=torch.float64)
        for tau, rho in zip(times, (*times[1:], 0.0), strict=True):
            t = schedule.time_from_flow_time(torch.full_like(top, tau))
            r = schedule.time_from_flow_time(torch.full_like(top, rho)) if rho else torch.zeros_like(top)
            x0 = student(x, t, Conditioning({}, 2), r)
            x = ode_step(x, x0, schedule.coefficients(t), schedule.coefficients(r)) if rho else x0
        ends.append(x)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_a_second_time_behind_the_first_is_refused():
    t = torch.tensor([0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match="the second time r is at most t"):
        gaussian(FlowSchedule(), "flow").raw(torch.zeros(1, 2), t, Conditioning({}, 1), t + 0.1)


def test_a_flow_networks_velocity_is_its_answer():
    t = torch.tensor([0.1, 0.77], dtype=torch.float64)
    raw = torch.randn(2, 5)
    assert torch.equal(to_velocity(raw, "flow", torch.randn(2, 5), FlowSchedule(), t), raw)
