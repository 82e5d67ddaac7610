"""Windows: their edges, the times in them, and what is said of a chord, in every form."""

import pytest
import torch
from toys import TABLE

from fewstep.diffusion.prediction import add_noise, expand, ode_step, transition
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule
from fewstep.diffusion.timesteps import even_grid, shift_time
from fewstep.diffusion.windows import (
    Window,
    chord_end,
    line,
    noise_map,
    noise_of_chord,
    noisy_weight,
    on_chord,
    slope,
    solver_times,
    times_up_to,
    window_at,
    windows_of,
)

DRAW = torch.Generator().manual_seed(0)
X_S, X_E = (torch.randn(4, 5, generator=DRAW, dtype=torch.float64) for _ in range(2))
WINDOW = Window(torch.tensor([1.0, 0.75, 0.5, 0.25]).double(), torch.tensor([0.75, 0.5, 0.25, 0.0]).double())
BETWEEN = WINDOW.end + torch.tensor([1.0, 0.7, 0.4, 0.1]).double() * (WINDOW.start - WINDOW.end)


def of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_windows_are_joined_steps_of_the_students_grid():
    grid = tuple(even_grid(6, 3.0).tolist())
    assert windows_of(grid, 6).edges == (0.0, *reversed(grid))
    assert windows_of(grid, 2).edges == (0.0, grid[3], grid[0])
    assert windows_of(grid, 1).edges == (0.0, 1.0)


def test_an_edge_belongs_to_the_window_below_it():
    windows = windows_of((1.0, 0.75, 0.5, 0.25), 4)
    t = of(1.0, 0.7501, 0.75, 0.5, 1 - 0.75, 0.2499, 0.001)
    window = window_at(windows, t)
    assert window.start.tolist() == [1.0, 1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert window.end.tolist() == [0.75, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert window_at(windows_of((0.6, 0.3), 2), of(0.3 + 1e-10)).start.item() == 0.3  # rounding


def test_times_are_the_tables_entries_and_even():
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.equal(times_up_to(1.0, uniform, TABLE), torch.arange(1000, 0, -1, dtype=torch.float64) / 1000)
    lower = times_up_to(0.4, uniform, TABLE)
    assert (lower.max().item(), lower.min().item()) == (0.4, 0.001)
    assert len(lower.unique()) == 400
    assert times_up_to(0.4, of(0.0), TABLE).item() == 0.4


def test_times_of_a_flow_are_even_before_its_shift():
    uniform = of(0.0, 0.25, 0.5, 0.75)
    torch.testing.assert_close(times_up_to(1.0, uniform, FlowSchedule(), 3.0), even_grid(4, 3.0))
    torch.testing.assert_close(times_up_to(0.8, uniform, EDMSchedule()), 0.8 * even_grid(4))
    # 0.8 is 4/7 before a shift of 3.
    torch.testing.assert_close(
        times_up_to(0.8, uniform, FlowSchedule(), 3.0), shift_time(4 / 7 * even_grid(4), 3.0), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule(), EDMSchedule()])
def test_the_solvers_times_lead_from_start_to_end(schedule):
    shift = 3.0 if isinstance(schedule, FlowSchedule) else 1.0
    edges = of(*even_grid(4, shift).tolist(), 0.0)
    window = Window(edges[:-1], edges[1:])
    times = solver_times(window, 4, schedule, shift)
    assert torch.equal(times[0], window.start) and torch.equal(times[-1], window.end)
    # Those of all windows together are the teacher's own, of four times as many steps.
    together = torch.cat([torch.stack(times[:-1]).T.flatten(), of(0.0)])
    wanted = torch.cat([schedule.snap(even_grid(16, shift)), of(0.0)])
    torch.testing.assert_close(together, wanted, rtol=0, atol=0.51e-3 if schedule is TABLE else 1e-12)


@pytest.mark.parametrize("form", ["ddim_eps", "diff_eps"])
def test_a_chords_noise_leads_to_its_end_from_every_point(form: str):
    start, end = (TABLE.coefficients(t) for t in (WINDOW.start, WINDOW.end))
    lam, eta = noise_map(form, start, end)
    said = noise_of_chord(X_S, X_E, lam, eta)
    x_t = on_chord(X_S, X_E, WINDOW.start, WINDOW.end, BETWEEN)
    share = (WINDOW.start - BETWEEN) / (WINDOW.start - WINDOW.end)
    torch.testing.assert_close(chord_end(x_t, said, share, lam, eta), X_E, rtol=0, atol=1e-12)


def test_the_noise_of_a_window_is_that_of_one_ddim_step_through_it():
    start, end = (TABLE.coefficients(t) for t in (WINDOW.start, WINDOW.end))
    noise = noise_of_chord(X_S, X_E, *noise_map("ddim_eps", start, end))
    x0 = (X_S - expand(start.sigma, X_S) * noise) / expand(start.alpha, X_S)
    torch.testing.assert_close(ode_step(X_S, x0, start, end), X_E, rtol=0, atol=1e-12)


def test_the_other_noise_leads_back():
    start, end = (TABLE.coefficients(t) for t in (WINDOW.start, WINDOW.end))
    noise = noise_of_chord(X_S, X_E, *noise_map("diff_eps", start, end))
    torch.testing.assert_close(add_noise(X_E, noise, transition(end, start)), X_S, rtol=0, atol=1e-12)


def test_a_velocity_is_that_of_a_constant_x0_and_of_a_flows_own_x_t():
    x0, noise = X_S, X_E
    for schedule in (TABLE, FlowSchedule(), EDMSchedule()):
        (scale_s, at_s), (scale_e, at_e) = (line("velocity", schedule, t) for t in (WINDOW.start, WINDOW.end))
        ends = [add_noise(x0, noise, schedule.coefficients(t)) for t in (WINDOW.start, WINDOW.end)]
        y_s, y_e = ends[0] / expand(scale_s, x0), ends[1] / expand(scale_e, x0)
        torch.testing.assert_close(slope(y_s, y_e, at_s, at_e), noise - x0, rtol=0, atol=1e-9)
    scale, position = line("velocity", FlowSchedule(), BETWEEN)
    assert torch.equal(scale, torch.ones(4, dtype=torch.float64)) and torch.equal(position, BETWEEN)


def test_the_weight_of_the_noise_has_an_end():
    torch.testing.assert_close(noisy_weight(of(0.0, 0.5, 0.9, 1.0)), of(1, 2, 10, 10) / 2.3)
