"""Walks along the ODE of Gaussian data, whose paths have a closed form, under every family of schedules."""

from functools import partial

import diffusers
import pytest
import torch
from torch import Tensor
from toys import unconditional

from fewstep.diffusion.ode import OdeSolver, inversion_times, solver_step, straightness, teacher_times
from fewstep.diffusion.prediction import expand, ode_step
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule

STD = 0.7
SCHEDULES = {
    "flow": FlowSchedule(),
    "table": TableSchedule(diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012).alphas_cumprod),
    "edm": EDMSchedule(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Gaussian:
    """The exact x0 for data of standard deviation ``STD``."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def spread(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.coefficients(t)
        return (alpha**2 * STD**2 + sigma**2).sqrt()

    def __call__(self, x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
        alpha, _ = self.schedule.coefficients(t)
        return expand(alpha * STD**2 / self.spread(t) ** 2, x_t) * x_t


def at(t: float) -> Tensor:
    return torch.full((3,), t, dtype=torch.float64)


def noise() -> Tensor:
    return torch.randn(3, 2, 4, dtype=torch.float64)


@every_schedule
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_a_solver_has_its_order(schedule: NoiseSchedule, solver: str, order: int):
    teacher, x = Gaussian(schedule), noise()
    ode_solver, now, then = OdeSolver(teacher, schedule, solver), 0.9, 0.5
    exact = x * expand(teacher.spread(at(then)) / teacher.spread(at(now)), x)

    def error(steps: int) -> float:
        times = torch.linspace(now, then, steps + 1, dtype=torch.float64).tolist()
        return float((ode_solver.to_noise(x, times, unconditional(3)) - exact).abs().max())

    assert error(40) < 0.05 * float(exact.abs().max())
    assert error(20) / error(40) == pytest.approx(2**order, rel=0.2)


@every_schedule
@pytest.mark.parametrize("line", ["flow", "edm"])
def test_an_euler_step_is_the_one_of_all_families_in_both_coordinates(schedule: NoiseSchedule, line: str):
    teacher, x = Gaussian(schedule), noise()
    stepped = OdeSolver(teacher, schedule, line=line).step(x, 0.8, 0.3, unconditional(3))
    now, then = schedule.coefficients(at(0.8)), schedule.coefficients(at(0.3))
    torch.testing.assert_close(stepped, ode_step(x, teacher(x, at(0.8), None), now, then))


@every_schedule
def test_data_is_found_from_noise_and_noise_from_data(schedule: NoiseSchedule):
    teacher, x = Gaussian(schedule), noise()
    ode_solver = OdeSolver(teacher, schedule, "heun")
    start = schedule.initial_scale() * x
    x0 = ode_solver.to_data(start, teacher_times(schedule, 200), unconditional(3))
    torch.testing.assert_close(x0, start * STD / expand(teacher.spread(at(1)), x), rtol=5e-3, atol=0)
    times = inversion_times(schedule, 200)
    lowest = x0 * expand(teacher.spread(at(times[0])), x) / STD
    torch.testing.assert_close(ode_solver.to_noise(lowest, times, unconditional(3)), start, rtol=1e-2, atol=0)


@every_schedule
def test_times_descend_from_the_top_and_inversion_goes_the_same_way_back(schedule: NoiseSchedule):
    down, up = teacher_times(schedule, 8), inversion_times(schedule, 8)
    assert down[0] == 1 and len(down) == 8 and sorted(down, reverse=True) == down
    assert up[-1] == 1 and up[0] > 0 and sorted(up) == up
    assert set(up[1:]) <= set(down)


def test_edm_times_are_the_ramp_of_karras_and_flow_times_are_shifted():
    sigma = EDMSchedule().coefficients(torch.tensor(teacher_times(EDMSchedule(), 18), dtype=torch.float64)).sigma
    steps = torch.arange(18, dtype=torch.float64)
    ramp = (80 ** (1 / 7) + steps / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(sigma, ramp, rtol=1e-10, atol=0)
    assert teacher_times(FlowSchedule(), 4, shift=3.0) == pytest.approx([1, 0.9, 0.75, 0.5])


def test_with_an_anchor_every_step_mixes_the_first_noise_in():
    schedule, x = FlowSchedule(), noise()
    teacher = Gaussian(schedule)
    stepped = OdeSolver(teacher, schedule, anchor=x).step(0.5 * x, 0.8, 0.3, unconditional(3))
    torch.testing.assert_close(stepped, 0.7 * teacher(0.5 * x, at(0.8), None) + 0.3 * x)


def test_straightness_is_that_of_the_closed_form():
    """A path of Gaussian data is z S(t), so its chord differs from its velocity by z (S(1) - S(0) - S'(t))."""
    schedule, x = FlowSchedule(), torch.randn(2000, 2, dtype=torch.float64)
    times = teacher_times(schedule, 400)
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    slope = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
    expected = float(x.square().mean() * (1 - STD - slope).square().mean())
    found = float(straightness(Gaussian(schedule), schedule, times, x, unconditional(2000)))
    assert found == pytest.approx(expected, rel=0.02)


@every_schedule
def test_paths_to_one_point_are_straight(schedule: NoiseSchedule):
    x = noise()
    point = torch.full_like(x, 0.3)
    bend = straightness(lambda x_t, t, c: point, schedule, teacher_times(schedule, 10), x, unconditional(3))
    assert float(bend) < 1e-20


def test_unknown_solvers_are_refused():
    with pytest.raises(ValueError, match="euler or heun"):
        OdeSolver(lambda x_t, t, c: x_t, FlowSchedule(), "rk45")


@every_schedule
def test_each_sample_may_step_from_and_to_times_of_its_own(schedule: NoiseSchedule):
    teacher, x = Gaussian(schedule), noise()
    now, then = torch.tensor([0.9, 0.5, 0.8]).double(), torch.tensor([0.4, 0.6, 0.1]).double()
    together = solver_step(partial(teacher, conditioning=None), schedule, x, now, then, "heun")
    ode_solver = OdeSolver(teacher, schedule, "heun")
    alone = [ode_solver.step(x, float(a), float(b), None)[i] for i, (a, b) in enumerate(zip(now, then))]
    torch.testing.assert_close(together, torch.stack(alone))


def test_a_heun_step_to_the_clean_sample_is_one_of_euler():
    schedule, x = FlowSchedule(), noise()
    end = torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)
    result = solver_step(lambda x, t: 0.5 * x, schedule, x, at(0.3), end, "heun")
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result[0], 0.5 * x[0])
