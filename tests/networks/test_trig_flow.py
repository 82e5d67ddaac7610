"""TrigFlow's F of networks in other schedules, its derivatives, and the tangent, by closed forms in float64."""

import math

import pytest
import torch
from torch import Tensor, nn
from toys import TABLE, PlainRecipe, TinyNetwork, every_kind_of_teacher, labels, unconditional

from fewstep.diffusion.prediction import add_noise, from_x0, ode_step, to_x0
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.diffusion.trig_flow import TrigFlow
from fewstep.errors import UserError
from fewstep.losses.trig_flow import NORMALIZATIONS, TANGENTS, by_log_variance, normalized, tangent, tangent_loss
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.trig_flow import DERIVATIVES, Point, TrigFlowNetwork

SIGMA_DATA = (1.0, 0.5)
both_scales = pytest.mark.parametrize("sigma_data", SIGMA_DATA)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(schedule: NoiseSchedule) -> Tensor:
    return schedule.snap(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))


class Through(TinyNetwork):
    """Of no dtype but float64."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(6, time_scale=1e-2)
        self.double()


def network(schedule: NoiseSchedule, kind: str, net: nn.Module | None = None) -> NetworkDenoiser:
    return NetworkDenoiser(net or Through(), PlainRecipe(), schedule, kind)


# --- the same sample under both names ---------------------------------------------------------------------------------


@both_scales
@every_kind_of_teacher
def test_f_is_what_makes_of_trigflows_sample_the_networks_x0(schedule: NoiseSchedule, kind: str, sigma_data: float):
    trig, t, raw = TrigFlow(schedule, sigma_data), times(schedule), normal(3, 6, seed=1)
    x0, noise = normal(3, 6, seed=2), normal(3, 6, seed=3)
    x_t = add_noise(x0, noise, schedule.coefficients(t))
    angle = trig.angle(t)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    y = trig.sample(x_t, t)
    torch.testing.assert_close(y, cos * x0 + sin * sigma_data * noise)
    torch.testing.assert_close(trig.moved(y, t), x_t)
    torch.testing.assert_close(trig.time(angle), t)
    said = trig.output(raw, kind, x_t, t)
    torch.testing.assert_close(cos * y - sigma_data * sin * said, to_x0(raw, kind, x_t, schedule, t))


@pytest.mark.parametrize("schedule", [FlowSchedule(), TABLE, EDMSchedule()], ids=["flow", "table", "edm"])
def test_an_ode_step_is_a_rotation(schedule: NoiseSchedule):
    trig, t = TrigFlow(schedule, 0.5), times(schedule)
    then, x_t, x0 = 0.7 * t, normal(3, 6), normal(3, 6, seed=1)
    step = ode_step(x_t, x0, schedule.coefficients(t), schedule.coefficients(then))
    direction = 0.5 * trig.output(x0, "sample", x_t, t)
    gap = (trig.angle(t) - trig.angle(then))[:, None]
    turned = gap.cos() * trig.sample(x_t, t) - gap.sin() * direction
    torch.testing.assert_close(trig.moved(turned, then), step)


# --- derivatives --------------------------------------------------------------------------------------------------


def on_the_way(denoiser: NetworkDenoiser, sigma_data: float) -> tuple[TrigFlowNetwork, Point]:
    trig, t = TrigFlow(denoiser.schedule, sigma_data), times(denoiser.schedule)
    x_t = add_noise(normal(3, 6), normal(3, 6, seed=1), denoiser.schedule.coefficients(t))
    return TrigFlowNetwork(denoiser, trig), Point(x_t, t, labels([0.5, -1.0, 2.0]), normal(3, 6, seed=2))


@both_scales
@every_kind_of_teacher
def test_a_derivative_is_the_limit_of_differences_along_the_trajectory(
    schedule: NoiseSchedule, kind: str, sigma_data: float
):
    """Of F(cos h y + sin h v, angle + h) between h and -h, all worked out here."""
    output, at = on_the_way(network(schedule, kind), sigma_data)
    trig, h = output.trig, 1e-5
    if schedule is TABLE:  # of straight lines between its entries: it is differentiated inside of one
        at = at._replace(t=at.t + 0.3 / TABLE.num_train_timesteps)
    angle, y = trig.angle(at.t), trig.sample(at.x_t, at.t)

    def there(way: float) -> Tensor:
        t = trig.time(angle + way)
        turned = math.cos(way) * y + math.sin(way) * at.direction
        return output(trig.moved(turned, t), t, at.conditioning)

    with torch.no_grad():
        expected = (angle.cos() * angle.sin())[:, None] * (there(h) - there(-h)) / (2 * h)
    found = output.derivative(at)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found.requires_grad and bool(found.any())


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule()], ids=["flow", "edm"])
def test_every_way_to_take_it_comes_to_the_same(schedule: NoiseSchedule, kind: str):
    exact, at = on_the_way(network(schedule, "flow" if isinstance(schedule, FlowSchedule) else "edm"), 0.5)
    found = TrigFlowNetwork(exact.denoiser, exact.trig, kind, 1e-6).derivative(at)
    torch.testing.assert_close(found, exact.derivative(at), rtol=1e-4, atol=1e-5)


def test_a_discrete_derivative_of_a_tables_network_asks_at_entries_alone():
    exact, at = on_the_way(network(TABLE, "epsilon"), 1.0)
    at = at._replace(t=torch.tensor([2, 500, 1000], dtype=torch.float64) / 1000)
    trig, asked = exact.trig, []
    for step, then in ((1e-9, [1, 499, 999]), (0.02, None)):
        asked.clear()
        exact.denoiser.on_call = lambda _x, t, _early: asked.append(1000 * t) or (lambda _answer: None)
        found = TrigFlowNetwork(exact.denoiser, trig, "discrete", step).derivative(at)
        torch.testing.assert_close(asked[1], asked[1].round(), rtol=0, atol=1e-9)
        r = asked[1].round() / 1000
        assert then is None or (1000 * r).tolist() == then
        angle, gap = trig.angle(at.t)[:, None], (trig.angle(at.t) - trig.angle(r))[:, None]
        assert then is not None or bool((gap[1:] > 0.018).all() & (gap[1:] < 0.025).all())
        y = gap.cos() * trig.sample(at.x_t, at.t) - gap.sin() * at.direction
        with torch.no_grad():
            change = gap.cos() * exact(at.x_t, at.t, at.conditioning) - exact(trig.moved(y, r), r, at.conditioning)
        torch.testing.assert_close(found, angle.cos() * angle.sin() * change / gap.sin())


def test_a_renoised_derivative_asks_a_share_of_the_angle_to_both_sides():
    exact, at = on_the_way(network(FlowSchedule(), "flow"), 0.5)
    angle, asked = exact.trig.angle(at.t), []
    exact.denoiser.on_call = lambda _x, t, _early: asked.append(exact.trig.angle(t)) or (lambda _answer: None)
    TrigFlowNetwork(exact.denoiser, exact.trig, "renoise", 0.02).derivative(at)
    torch.testing.assert_close(torch.stack(asked), torch.stack([1.02 * angle, 0.98 * angle]))


class Resampling(Through):
    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        said = super().forward(x, timestep, label).reshape(-1, 1, 2, 3)
        return nn.functional.grid_sample(said, said.new_zeros(len(x), 2, 3, 2), align_corners=False).flatten(1)


def test_a_network_without_a_derivative_is_told_what_to_take_instead():
    output, at = on_the_way(network(FlowSchedule(), "flow", Resampling()), 1.0)
    with pytest.raises(UserError, match=r"has no forward derivative.*take --derivative discrete") as caught:
        output.derivative(at)
    assert "\n" not in str(caught.value)


# --- the tangent ------------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """The exact consistency function of data of standard deviation s, in the words of a schedule."""

    def __init__(self, schedule: NoiseSchedule, kind: str, s: float) -> None:
        super().__init__()
        self.schedule, self.kind, self.s = schedule, kind, s
        self.register_parameter("dtype", nn.Parameter(torch.zeros(1, dtype=torch.float64)))  # which calls go by

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = self.schedule.time(timestep)
        x_t = x / self.schedule.input_scale(t)[:, None]
        alpha, sigma = self.schedule.coefficients(t)
        x0 = x_t * (self.s / ((alpha * self.s) ** 2 + sigma**2).sqrt())[:, None]
        return from_x0(x0, self.kind, x_t, self.schedule, t)


@pytest.mark.parametrize("form", TANGENTS)
@both_scales
@every_kind_of_teacher
def test_the_tangent_of_the_exact_solution_is_zero(schedule: NoiseSchedule, kind: str, sigma_data: float, form: str):
    """And not a little beside it; x0 = x_t s / sqrt(alpha^2 s^2 + sigma^2) is where every trajectory ends."""
    s, t = 0.7, times(schedule)
    trig, x_t = TrigFlow(schedule, sigma_data), normal(3, 6)
    (alpha, sigma), y, angle = schedule.coefficients(t), trig.sample(x_t, t), trig.angle(t)
    teacher = x_t * (alpha * s**2 / ((alpha * s) ** 2 + sigma**2))[:, None]
    direction = sigma_data * trig.output(teacher, "sample", x_t, t)
    sizes = []
    for off in (s, 1.01 * s):
        output = TrigFlowNetwork(network(schedule, kind, Gaussian(schedule, kind, off)), trig)
        at = Point(x_t, t, unconditional(3), direction)
        said = output(x_t, t, at.conditioning)
        g = tangent(form, said, output.derivative(at), y, direction, angle, 1.0, sigma_data)
        sizes.append(float(g.abs().max()))
    assert sizes[0] < 1e-9 < 1e-4 < sizes[1]


@pytest.mark.parametrize("form", TANGENTS)
def test_a_tangent_is_f_along_its_trajectory_and_without_its_share_the_teacher_itself(form: str):
    output, at = on_the_way(network(FlowSchedule(), "flow"), 0.5)
    trig, h = output.trig, 1e-5
    angle, y = trig.angle(at.t), trig.sample(at.x_t, at.t)
    said, change = output(at.x_t, at.t, at.conditioning), output.derivative(at)

    def f(way: float) -> Tensor:
        t, at_angle = trig.time(angle + way), (angle + way)[:, None]
        turned = y + way * at.direction
        return at_angle.cos() * turned - 0.5 * at_angle.sin() * output(trig.moved(turned, t), t, at.conditioning)

    with torch.no_grad():
        expected = angle.cos()[:, None] * (f(h) - f(-h)) / (2 * h)
    found = tangent(form, said, change, y, at.direction, angle, 1.0, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert not found.requires_grad
    started = tangent(form, said, 0 * change, y, at.direction, angle, 0.0, 0.5)
    power = 2 if form == "scm" else 1  # as the authors' codes have it
    torch.testing.assert_close(started, angle.cos()[:, None] ** power * (at.direction - 0.5 * said.detach()))


def test_rcms_warm_up_spares_the_derivative_unless_it_is_told_not_to():
    numbers = normal(3, 6), normal(3, 6, seed=1), normal(3, 6, seed=2), normal(3, 6, seed=3), torch.rand(3).double()
    apart = [tangent("rcm", *numbers, 0.25, warm_derivative=warm) for warm in (False, True)]
    torch.testing.assert_close(apart[1] - apart[0], 0.75 * numbers[1])
    with pytest.raises(ValueError, match="one of scm, rcm"):
        tangent("tcm", *numbers)


def test_a_tangent_is_brought_to_the_length_that_is_asked_for():
    g = 3 * normal(4, 2, 3)
    norm = g.flatten(1).norm(dim=1)[:, None, None]
    expected = {
        "none": g,
        "clip": g.clamp(-1, 1),
        "norm": g / (norm + 0.2),
        "norm/sqrt(dim)": g / (norm / math.sqrt(6) + 0.2),
    }
    for kind in NORMALIZATIONS:
        torch.testing.assert_close(normalized(g, kind, 0.2), expected[kind])
    with pytest.raises(ValueError, match="not 'l1'"):
        normalized(g, "l1")


def test_the_loss_moves_f_along_the_tangent_and_shows_its_size():
    said, g = normal(2, 5).requires_grad_(), normal(2, 5, seed=1)
    loss = tangent_loss(said, g)
    torch.testing.assert_close(loss, g.square().mean(1))
    (found,) = torch.autograd.grad(loss.sum(), said)
    torch.testing.assert_close(found, -2 * g / 5)
    w = torch.tensor([0.3, 2.0], dtype=torch.float64).log().requires_grad_()
    (found,) = torch.autograd.grad(by_log_variance(torch.tensor([0.3, 2.0]).double(), w).sum(), w)
    torch.testing.assert_close(found, torch.zeros(2).double())
