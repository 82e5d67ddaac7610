"""AnyFlow where everything is known: flow maps of Gaussians, composed, guided, and matched."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import labels, role

from fewstep.data.batch import Batch, Pairs
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.placed_times import Parts
from fewstep.diffusion.rollout import Sampler, rollout, shortcut
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.networks.finite_difference import FiniteDifference
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.any_flow import AnyFlow, Points
from tests.trainers.toy_any_flow import Telling, config

SCHEDULE = FlowSchedule()
#: Mean and standard deviation without a condition (label 0) and with one (label 1).
LAWS = {0.0: (0.0, 1.0), 1.0: (0.8, 0.5)}


def spread(t: Tensor, s: float) -> Tensor:
    return ((1 - t) ** 2 * s**2 + t**2).sqrt()


def flow_velocity(x: Tensor, t: Tensor, m: float, s: float) -> Tensor:
    """E[noise - x0 | x_t] of data N(m, s^2)."""
    return (t - (1 - t) * s**2) / spread(t, s) ** 2 * (x - (1 - t) * m) - m


class GaussianTeacher(nn.Module):
    """The exact velocity of each label's Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        t, x = (timestep / 1000).double()[:, None], x.double()
        each = {name: flow_velocity(x, t, *law) for name, law in LAWS.items()}
        return torch.where(label[:, None] > 0.5, each[1.0], each[0.0]) + self.zero


class GuidedMap(nn.Module):
    """The exact average velocity of the flow guided by a scale: Runge-Kutta of fourth order from t to r.

    Without the condition it is the null law's own.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.told = scale, torch.zeros(())
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def velocity(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        c, u = (flow_velocity(x, t, *LAWS[which]) for which in (1.0, 0.0))
        return torch.where(label[:, None] > 0.5, u + self.scale * (c - u), u)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        t, gap, y = (timestep / 1000).double()[:, None], self.told.double()[:, None], x.double()
        label, steps = label.round(), 16
        start, h = y, -gap / steps
        for k in range(steps):
            now = t + k * h
            a = self.velocity(y, now, label)
            b = self.velocity(y + h / 2 * a, now + h / 2, label)
            c = self.velocity(y + h / 2 * b, now + h / 2, label)
            y = y + h / 6 * (a + 2 * b + 2 * c + self.velocity(y + h * c, now + h, label))
        average = (start - y) / torch.where(gap > 0, gap, 1.0)
        return torch.where(gap > 0, average, self.velocity(start, t, label)) + self.zero


class TellingMap(Telling):
    """Tells an exact map its gap."""

    def on(self, network: GuidedMap, gap):  # type: ignore[override]
        class Inside:
            def __enter__(self) -> None:
                network.told = gap()

            def __exit__(self, *_: object) -> None:
                pass

        return Inside()


def exact(scale: float, **settings) -> AnyFlow:
    """AnyFlow whose student is the exact map of the teacher guided by ``scale``."""
    roles = {"teacher": role("teacher", GaussianTeacher(), SCHEDULE, "flow", False)}
    roles["student"] = role("student", GuidedMap(scale), SCHEDULE, "flow")
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, TellingMap())
    guided = GuidedDenoiser(roles["teacher"], scale)
    settings = config(stage="map", **settings)
    return AnyFlow(settings, roles, guided, Sampler(SCHEDULE, (1.0,), "ode"))


def batch(count: int) -> Batch:
    told, x0 = labels([1.0] * count, 0.0), torch.randn(count, 1, generator=torch.Generator().manual_seed(3)).double()
    return Batch(count, (1,), told, Draws(0, 0, range(count)), None, False, Pairs(x0, x0, told), per_step=count)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_three_steps_of_an_exact_map_end_where_every_step_of_the_sampler_does(steps: int, shift: float):
    s, noise = 0.4, torch.randn(64, 1, generator=torch.Generator().manual_seed(1)).double()

    def mapped(x: Tensor, t: Tensor, _conditioning: object, end: Tensor) -> Tensor:
        """x0 such that an ODE step leads to x S(r) / S(t)."""
        u = x * ((1 - spread(end, s) / spread(t, s)) / (t - end))[:, None]
        return x - t[:, None] * u

    grid = even_grid(steps, shift).tolist()
    for place in range(steps):
        walk = shortcut(grid, place)
        assert len(walk) == 1 + (place > 0) + (place < steps - 1)
        ends = [rollout(mapped, Sampler(SCHEDULE, tuple(g), "ode"), noise, labels([0.0])) for g in (grid, walk)]
        torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ends[0], s * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("derivative", "close"), [("exact", 1e-9), ("central", 2e-9)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_map_of_the_guided_flow_is_where_the_loss_is_least(derivative: str, close: float, scale: float):
    step = {} if derivative == "exact" else {"derivative_step": 1e-3}
    one = exact(scale, derivative=derivative, **step, weighting="uniform", weight_power=0.0)
    loss, _ = one.map_loss(batch(32))
    assert float(loss.detach()) < close
    # And not that of the flow guided otherwise.
    one.roles["student"].denoiser.network.scale = scale + 0.5
    assert float(one.map_loss(batch(32))[0]) > 1e-3


def test_the_authors_form_has_another_fixed_point_for_guided_maps():
    """Residuals at t 0.8, r 0.3 of the map guided by 3: 1.14, 0.32, -0.24 at three places, where ours has none."""
    x = torch.tensor([[-1.0], [0.3], [1.2]], dtype=torch.float64)
    t, r = (torch.full((3,), time, dtype=torch.float64) for time in (0.8, 0.3))
    conditioning, kept = labels([1.0] * 3, 0.0), torch.ones(3, dtype=torch.bool)
    parts = Parts([], [], [0, 1, 2])
    found = {}
    for velocity in ("teacher", "data"):
        one = exact(3.0, derivative="central", derivative_step=1e-3, velocity=velocity, data="images")
        one.difference = replace(one.difference or FiniteDifference("central", 1e-3), step=1e-3)
        # In the place of noise - x0 its mean, given x_t.
        flow = one.mapped(x, t, conditioning) if velocity == "teacher" else flow_velocity(x, t[:, None], *LAWS[1.0])
        points = Points(x, t, r, flow, conditioning, kept, parts)
        u = one.student.velocity(x, t, conditioning, r)
        said, target, _ = one.guided(points, u, one.change(points, u))
        found[velocity] = (said - target).flatten().detach()
    assert float(found["teacher"].abs().max()) < 1e-5
    expected = torch.tensor([1.14, 0.32, -0.24], dtype=torch.float64)
    torch.testing.assert_close(found["data"], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [2, 4])
def test_matching_rests_where_the_rollouts_end_has_the_teachers_law_and_only_there(steps: int):
    """A map that is off by a factor ends in another Gaussian, of which the critic is exact: it is pushed back."""
    torch.manual_seed(0)
    m, s = LAWS[1.0]
    for factor in (1.0, 1.3, 0.7):
        for place in range(steps):
            one = exact(1.0)
            noise = torch.randn(500, 1).double()
            walk = shortcut(even_grid(steps).tolist(), place)
            told = labels([1.0] * 500, 0.0)
            with torch.no_grad():
                end = rollout(one.roles["student"], Sampler(SCHEDULE, walk, "ode"), noise, told)
            x0 = m + factor * (end - m)

            class Critic:
                def __call__(self, x: Tensor, t: Tensor, _told: object, own: float = factor * s) -> Tensor:
                    return x - t[:, None] * flow_velocity(x, t[:, None], m, own)

            one.critic = Critic()  # type: ignore[assignment]
            given = Batch(500, (1,), told, Draws(0, place, range(500)), None, False, per_step=500)
            gradient, _ = one.matching(x0, given)
            # Gradient descent moves x0 by -gradient: towards the mean where the spread is too large.
            pull = float((gradient * (x0 - m)).mean()) * gradient.numel()
            if factor == 1.0:
                assert float(gradient.abs().max()) * gradient.numel() < 1e-6
            else:
                assert math.copysign(1.0, pull) == math.copysign(1.0, factor - 1) and abs(pull) > 1e-2
