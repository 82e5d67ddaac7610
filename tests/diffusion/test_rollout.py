"""The student's walk: what each call is fed, where gradient flows, and what noise it takes."""

import pytest
import torch
from torch import Tensor, nn
from toys import unconditional

from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.rollout import Sampler, ode_sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule

GRID = (1.0, 0.75, 0.5, 0.25)
TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"table": TABLE, "flow": FlowSchedule(), "edm": EDMSchedule()}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


class Student(nn.Module):
    """x0 = w x_t; it notes its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.ends: list[list[float]] = []

    def forward(self, x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
        x0 = self.w * x_t
        self.calls.append((x_t, t, x0))
        self.ends.append(end.tolist())
        return x0


def walk(sampler: Sampler, last: int | None = None, seed: int = 0) -> tuple[Student, Tensor, dict[int, Tensor]]:
    student, drawn = Student(), {}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 2, generator=generator)

    def step_noise(step: int) -> Tensor:
        drawn[step] = torch.randn(3, 2, generator=generator)
        return drawn[step]

    x0 = rollout(student, sampler, noise, unconditional(3), step_noise, last)
    drawn[0] = noise
    return student, x0, drawn


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
@pytest.mark.parametrize("last", range(4))
def test_gradient_flows_through_the_last_call_only(renoise: str, last: int):
    student, x0, _ = walk(Sampler(FlowSchedule(), GRID, renoise), last)
    assert len(student.calls) == last + 1
    assert [out.requires_grad for _, _, out in student.calls] == [False] * last + [True]
    x_t, _, out = student.calls[-1]
    assert x0 is out
    assert not x_t.requires_grad
    x0.sum().backward()
    torch.testing.assert_close(student.w.grad, x_t.sum())  # d(w x_t)/dw, and nothing through x_t


def test_without_gradient_mode_no_graph_is_built():
    with torch.no_grad():
        _, x0, _ = walk(Sampler(FlowSchedule(), GRID, "fresh"))
    assert not x0.requires_grad


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 80.006])
def test_the_first_call_is_fed_pure_noise(schedule, scale: float):
    # A table's last entry still holds some signal; the student is trained and sampled on pure noise all the same.
    student, _, drawn = walk(Sampler(schedule, GRID, "fresh", scale))
    assert torch.equal(student.calls[0][0], scale * drawn[0])


@every_schedule
def test_every_later_call_is_fed_its_own_fresh_noise(schedule):
    student, _, drawn = walk(Sampler(schedule, GRID, "fresh"))
    assert sorted(drawn) == [0, 1, 2, 3]
    assert len({tensor.sum().item() for tensor in drawn.values()}) == 4
    for step in (1, 2, 3):
        t = torch.full((3,), GRID[step], dtype=torch.float64)
        expected = add_noise(student.calls[step - 1][2], drawn[step], schedule.coefficients(t))
        torch.testing.assert_close(student.calls[step][0], expected)


@every_schedule
def test_an_ode_walk_takes_the_one_step_rule_draws_nothing_and_repeats_itself(schedule):
    sampler = Sampler(schedule, GRID, "ode")
    student, x0, drawn = walk(sampler)
    assert sorted(drawn) == [0]
    for step in (1, 2, 3):
        now, then = (schedule.coefficients(torch.full((3,), GRID[k], dtype=torch.float64)) for k in (step - 1, step))
        expected = ode_step(student.calls[step - 1][0], student.calls[step - 1][2], now, then)
        torch.testing.assert_close(student.calls[step][0], expected)
    assert torch.equal(x0, walk(sampler)[1])


def test_every_sample_is_at_the_same_time_in_float64():
    student, _, _ = walk(Sampler(FlowSchedule(), GRID, "fresh"))
    for step, (_, t, _) in enumerate(student.calls):
        assert t.dtype == torch.float64
        assert t.tolist() == [GRID[step]] * 3


@pytest.mark.parametrize("last", range(4))
def test_every_call_is_told_where_its_step_ends(last: int):
    student, _, _ = walk(Sampler(FlowSchedule(), GRID, "fresh"), last)
    assert student.ends == [[end] * 3 for end in (0.75, 0.5, 0.25, 0.0)[: last + 1]]


def test_a_walk_that_stops_early_is_the_beginning_of_the_whole_one():
    whole, _, _ = walk(Sampler(FlowSchedule(), GRID, "fresh"))
    part, _, drawn = walk(Sampler(FlowSchedule(), GRID, "fresh"), last=2)
    assert sorted(drawn) == [0, 1, 2]
    for (ours, _, _), (theirs, _, _) in zip(part.calls, whole.calls[:3], strict=True):
        assert torch.equal(ours, theirs)


def test_the_teachers_walk_converges_to_the_exact_flow():
    """N(2, 0.5^2) under its exact denoiser: the ODE maps a standard normal z to 2 + 0.5 z."""
    schedule = FlowSchedule()

    def teacher(x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
        alpha, sigma = (c.reshape(-1, 1) for c in schedule.coefficients(t))
        return 2 + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (x_t - 2 * alpha)

    noise = torch.randn(5, 3, dtype=torch.float64)
    errors = [
        (rollout(teacher, ode_sampler(schedule, steps), noise, unconditional(5)) - (2 + 0.5 * noise)).abs().max()
        for steps in (50, 100, 200)
    ]
    assert errors[2] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler is of first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("last", [4, -2])
def test_a_step_that_the_grid_lacks_is_refused(last: int):
    with pytest.raises(ValueError, match="grid of 4"):
        walk(Sampler(FlowSchedule(), GRID, "ode"), last=last)


@pytest.mark.parametrize("grid", [(), (0.5, 0.5), (0.5, 0.75), (1.0, 0.0)])
def test_a_grid_descends_and_ends_above_zero(grid: tuple[float, ...]):
    with pytest.raises(ValueError, match="a grid descends"):
        Sampler(FlowSchedule(), grid, "ode")


def test_renoise_is_fresh_ode_or_tcd():
    with pytest.raises(ValueError, match="'fresh', 'ode' or 'tcd', not 'sde'"):
        Sampler(FlowSchedule(), GRID, "sde")
