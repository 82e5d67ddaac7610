"""Differences in the place of a derivative: of their order, one-sided at the ends, at a table's entries alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.networks.finite_difference import FiniteDifference, finite_difference
from fewstep.networks.flow_map import FlowMapDenoiser
from tests.networks.second_times import SCHEDULES, TABLE
from tests.networks.test_flow_map_gaussian import KINDS, gaussian

FLOW = FlowSchedule()


def at(student: FlowMapDenoiser, tau: list[float], rho: list[float]) -> tuple:
    """A point of a Gaussian's flow, and its velocity there."""
    t, r = (student.schedule.time_from_flow_time(torch.tensor(x, dtype=torch.float64)) for x in (tau, rho))
    x_t = torch.randn(len(tau), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = Conditioning({}, len(tau))
    return (x_t, t, nothing, r), student.velocity(x_t, t, nothing, t).detach()


def found(student: FlowMapDenoiser, point: tuple, along: Tensor, **how) -> Tensor:
    u = student.velocity(*point).detach()
    return FiniteDifference(**how)(student.velocity, student.schedule, *point, along, u)


@pytest.mark.parametrize(("kind", "order"), [("central", 2), ("renoise", 2), ("backward", 1)])
def test_the_error_falls_with_the_order_of_the_difference(kind: str, order: int):
    """Against the exact derivative in float64, at a tenth of the step."""
    student = gaussian(FLOW, "flow")
    point, velocity = at(student, [0.8, 0.5, 0.4], [0.2, 0.1, 0.3])
    along = torch.randn(velocity.shape, dtype=torch.float64) if kind == "renoise" else velocity
    _, exact = student.velocity_and_derivative(*point, along)
    errors = [float((found(student, point, along, kind=kind, step=h) - exact).norm()) for h in (1e-2, 1e-3)]
    assert errors[0] < 0.1 * float(exact.norm())
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.15)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_it_is_the_derivative_in_every_schedule_and_prediction_type(name: str, kind: str):
    student = gaussian(SCHEDULES[name], kind)
    point, velocity = at(student, [0.8, 0.6], [0.2, 0.1])
    _, exact = student.velocity_and_derivative(*point, velocity)
    torch.testing.assert_close(found(student, point, velocity, kind="central", step=1e-2), exact, rtol=2e-3, atol=1e-3)


def test_at_the_ends_it_is_one_sided_and_over_less_than_a_step_none():
    times = torch.tensor([0.995, 0.5, 0.305, 0.995, 0.5], dtype=torch.float64)
    second = torch.tensor([0.1, 0.1, 0.3, 0.99, 0.5], dtype=torch.float64)
    up, down = FiniteDifference("central", 0.01).ends(times, second)
    assert (up - times).tolist() == pytest.approx([0, 0.01, 0.01, 0, 0.01])
    assert (times - down).tolist() == pytest.approx([0.01, 0.01, 0, 0, 0])
    up, down = FiniteDifference("backward", 0.01).ends(times, second)
    assert (up - times).tolist() == pytest.approx([0, 0, 0.01, 0, 0.01])
    assert (times - down).tolist() == pytest.approx([0.01, 0.01, 0, 0, 0])
    up, down = FiniteDifference("renoise", 0.01).ends(times, second)
    assert (up - down)[1] == pytest.approx(0.01)
    student = gaussian(FLOW, "flow")
    for kind in ("central", "backward"):
        point, velocity = at(student, [0.995, 0.305, 0.995], [0.1, 0.3, 0.99])
        change = found(student, point, velocity, kind=kind, step=0.01)
        _, exact = student.velocity_and_derivative(*point, velocity)
        torch.testing.assert_close(change[:2], exact[:2], rtol=0.1, atol=0.05)
        assert not bool(change[2].any())


def test_no_network_is_asked_beyond_the_ends_nor_at_times_between_a_tables_entries():
    student, asked = gaussian(TABLE, "epsilon"), []
    point, velocity = at(student, [0.93, 0.5, 0.3], [0.1, 0.499, 0.0])
    point = point[0], TABLE.snap(point[1]), point[2], point[3]

    def noting(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor) -> Tensor:
        asked.append(t)
        return student.velocity(x_t, t, conditioning, end)

    high = float(TABLE.flow_time(torch.ones(1, dtype=torch.float64)))
    difference = FiniteDifference("central", 5e-3, high)
    change = difference(noting, TABLE, *point, velocity, student.velocity(*point))
    (times,) = asked
    assert len(times) == 6
    assert torch.equal(times, TABLE.snap(times)) and float(times.max()) <= 1
    _, exact = student.velocity_and_derivative(*point, velocity)
    torch.testing.assert_close(change[[0, 2]], exact[[0, 2]], rtol=0.02, atol=0.02)


def test_a_step_is_at_least_from_one_entry_of_a_table_to_the_next():
    apart = TABLE.flow_time(torch.arange(1, 1001, dtype=torch.float64) / 1000).diff().max().item()
    assert 1e-3 < apart < 5e-3
    assert finite_difference("central", 1e-4, TABLE, 0.9).step == apart
    assert finite_difference("backward", 5e-3, TABLE, 0.9) == FiniteDifference("backward", 5e-3, 0.9)
    assert finite_difference("renoise", 1e-5, FLOW, 1.0).step == 1e-5
    with pytest.raises(UserError, match="--derivative renoise takes steps that no entries"):
        finite_difference("renoise", 5e-3, TABLE, 0.9)
    with pytest.raises(ValueError, match="a difference is one of central, renoise, backward"):
        FiniteDifference("exact", 1e-3)
