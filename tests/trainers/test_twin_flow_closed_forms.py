"""TwinFlow's oracles in closed form: exact students of a point, Gaussians as twins, and the schedule's own paths."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import add_noise, expand
from fewstep.trainers.twin_flow import TwinFlow
from tests.trainers.test_twin_flow import weights_of
from tests.trainers.toy_any_flow import SCHEDULES
from tests.trainers.toy_twin_flow import batch, config, method


class ToAPoint:
    """The exact student of a point: (y - x0) / t on both sides, whatever r is."""

    def __init__(self, trained: TwinFlow, point: Tensor) -> None:
        self.of, self.point = trained.student, point

    def __call__(self, y: Tensor, t: Tensor, r: Tensor, conditioning: object) -> Tensor:
        return (y - self.point) / expand(t.abs(), y)

    def __getattr__(self, name: str) -> object:
        return getattr(self.of, name)


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_the_exact_student_of_a_point_has_nothing_to_learn(kind: str, order: int):
    """RCGM's residual is 0 at every order, and the twin agrees; of a table at its own times."""
    trained = method(config(order=order, parts=["any", "mul", "one", "flow", "adv", "e2e"]), kind)
    point = torch.linspace(-1, 1, 6, dtype=torch.float64)
    trained.student = trained.target = ToAPoint(trained, point)
    given = batch(24)
    points = trained.points(given)
    y = expand(1 - points.t, point[None]) * point + expand(points.t, point[None]) * batch(24).draws.normal(
        "noise", (6,)
    )
    points = replace(points, y=y.double(), line=(y - point) / points.t[:, None])
    u = trained.student(points.y, points.t, points.r, None)
    target = trained.recursion(points, u, points.line)
    torch.testing.assert_close(target, u, rtol=1e-7, atol=1e-7)
    _, gap = trained.rectification(points, u, given)
    assert float(gap) < 1e-12


def test_a_targets_step_does_not_pass_the_second_time_where_the_table_has_no_entry_there():
    """The exact student of a point has nothing to learn there either: its whole step is made once."""
    trained = method(config(order=1, parts=["any"], data="images", reference="frozen", first_step=0.01), "epsilon")
    point = torch.linspace(-1, 1, 6, dtype=torch.float64)
    trained.student = trained.target = ToAPoint(trained, point)
    t = trained.student.known(torch.linspace(0.1, 0.9, 24, dtype=torch.float64))
    r = t - 0.01  # as far as the first step, and mostly no entry
    assert bool((trained.student.known(r) < r - 1e-5).any())
    given = trained.points(batch(24))
    times = given.times._replace(t=t.tolist(), r=(r - 1e-12).tolist())
    y = given.y.double()
    points = replace(given, y=y, t=t, r=r, times=times, line=(y - point) / t[:, None])
    u = trained.student(y, t, r, None)
    torch.testing.assert_close(trained.recursion(points, u, points.line), u, rtol=1e-7, atol=1e-7)


def test_where_no_entry_is_as_far_as_the_first_step_the_target_is_the_velocity_itself():
    """At the table's first entry, from which no step leads to another one."""
    trained = method(config(parts=["one"], data="images", reference="frozen", first_step=5e-3), "epsilon")
    points = trained.points(batch())
    t = trained.student.known(torch.full_like(points.t, trained.parts.low))
    times = points.times._replace(t=t.tolist())
    assert all(trained.is_far(times, row) for row in range(8))
    u = points.line + 0.25
    found = trained.recursion(replace(points, t=t, times=times), u, points.line)
    torch.testing.assert_close(found, points.line)


def test_matching_draws_a_shifted_gaussian_home():
    """Exact velocities of N(m, 1) as samples and N(0, 1) as data: the loss's step brings m closer."""
    trained = weights_of(method(), distance="mse")

    class Gaussians:
        """v = noise - x0 of N(mean, 1): (2 t - 1)(y - (1 - t) mean) / ((1 - t)^2 + t^2) - mean."""

        def __init__(self, mean: float) -> None:
            self.mean, self.of = mean, trained.student

        def __call__(self, y: Tensor, t: Tensor, r: Tensor, conditioning: object) -> Tensor:
            mean, time = expand(torch.where(t < 0, self.mean, 0.0), y), expand(t.abs(), y)
            return (2 * time - 1) * (y - (1 - time) * mean) / ((1 - time) ** 2 + time**2) - mean

        known = property(lambda self: self.of.known)

    for mean in (0.8, -0.8):
        given = batch(64)
        points = trained.points(given)
        trained_student, trained.student = trained.student, Gaussians(mean)
        u = (points.y - mean).detach().requires_grad_()  # the one-step sample is y - u = mean, plus nothing
        loss, _ = trained.rectification(points, u, given)
        trained.student = trained_student
        (gradient,) = torch.autograd.grad(loss, u)
        moved = gradient[points.times.rows("e2e")].mean()  # the sample moves by + gradient
        assert float(moved) * mean < 0


def test_the_student_starts_as_its_teacher_on_both_sides_in_every_family():
    """Where the second time says nothing yet: what it is told for the twin is its own."""
    for kind in SCHEDULES:
        trained = method(kind=kind)
        student, teacher = trained.student, trained.roles["teacher"].single.denoiser
        teacher.network.load_state_dict(student.student.network.state_dict())
        with torch.no_grad():
            student.student.second_time.factor.zero_()
        given, t = batch(), torch.linspace(0.2, 0.8, 8, dtype=torch.float64)
        t = student.known(t * trained.parts.high)
        x_t, own = student.own(given.real.x0, t)
        expected = teacher.velocity(x_t, own, given.conditioning)
        for sign in (1, -1):
            found = student(given.real.x0, sign * t, sign * t, given.conditioning)
            torch.testing.assert_close(found, expected)
        with torch.no_grad():
            student.student.second_time.factor.fill_(1.0)
        real, fake = (student(given.real.x0, sign * t, sign * t, given.conditioning) for sign in (1, -1))
        torch.testing.assert_close(real, expected)
        assert float((fake - real).detach().abs().max()) > 1e-3


def test_noised_samples_lie_on_the_schedules_own_path():
    for kind, schedule in SCHEDULES.items():
        trained, given = method(kind=kind), batch()
        points = trained.points(given)
        x_t, own = trained.student.own(points.y, points.t)
        noise = batch().draws.normal("noise", (6,))
        for row, part in enumerate(points.times.part):
            if part in ("mul", "any"):
                expected = add_noise(given.real.x0, noise, schedule.coefficients(own))[row]
                torch.testing.assert_close(x_t[row], expected, rtol=1e-4, atol=1e-4)
            if part == "e2e":  # where sampling starts
                torch.testing.assert_close(x_t[row], schedule.initial_scale() * noise[row], rtol=1e-4, atol=1e-4)


def test_order_0_trains_plain_velocities_and_rectifies():
    trained = method(config(order=0))
    given = batch()
    points = trained.points(given)
    assert torch.equal(trained.recursion(points, torch.zeros_like(points.y), points.line), points.line)
    weights = trained.weights(points, given)
    for row, part in enumerate(points.times.part):
        assert (float(weights[row]) == 0) == (part in ("e2e", "any"))
    # 4.08 or a little less where both times nearly agree, twice as the others' half is left out; the twin's 1.
    assert float(weights.max()) == pytest.approx(8.1, abs=0.5) and 2.0 in weights.tolist()
