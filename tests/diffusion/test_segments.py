"""Segments of the time: their edges lie on the grid, and what is drawn inside of one stays there."""

import pytest
import torch
from toys import TABLE

from fewstep.diffusion.discretization import EvenTimes, SigmaRange
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.diffusion.segments import Segments, cut, draw_between
from fewstep.errors import UserError


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule()], ids=["table", "flow"])
def test_every_edge_is_a_time_of_the_grid_and_no_step_crosses_one(schedule, count: int):
    times = EvenTimes(SigmaRange(schedule), [41], shift=3.0).times(0)
    segments = cut(times.tolist(), count)
    assert len(segments) == count
    assert set(segments.edges) <= set(times.tolist())
    lower, upper = times[:-1], times[1:]
    assert bool((segments.lower(upper) <= lower).all())
    assert bool((segments.upper(upper) >= upper).all())
    assert segments.index(upper).bincount().tolist() == [40 // count] * count


def test_the_phases_of_pcm_are_those_of_its_code():
    # 50 points in 4 phases: edges at indices 0, 12, 25 and 37 of the points, one entry of the grid before each.
    times = EvenTimes(SigmaRange(TABLE), [51]).times(0)
    edges = [round(t * 1000 - 1) for t in cut(times.tolist(), 4, evenly=False).edges]
    assert edges == [0, 239, 499, 739, 999]


def test_an_edge_belongs_to_the_piece_below_it_and_the_lowest_time_to_the_first():
    segments = Segments((0.0, 0.25, 0.5, 1.0))
    t = torch.tensor([0.0, 0.1, 0.25, 0.25 + 1e-12, 0.26, 0.5, 1.0], dtype=torch.float64)
    assert segments.index(t).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert segments.lower(t).tolist() == [0, 0, 0, 0, 0.25, 0.25, 0.5]


def test_edges_move_to_the_times_that_a_scheduler_visits():
    visited = torch.tensor([0.0, 0.1, 0.25, 0.75, 1.0], dtype=torch.float32).tolist()
    assert Segments((0.0, 0.1, 1.0)).snapped(visited).edges == (0.0, visited[1], 1.0)


@pytest.mark.parametrize("schedule", [TABLE, FlowSchedule()], ids=["table", "flow"])
def test_ends_are_drawn_evenly_between_two_times(schedule):
    low, high = (torch.full((4000,), value, dtype=torch.float64) for value in (0.2, 0.203))
    drawn = draw_between(schedule, low, high, Draws(0, 0, range(4000)), "end")
    assert drawn.min() >= 0.2 - 1e-9 and drawn.max() <= 0.203 + 1e-9
    if schedule is TABLE:
        entries, counts = (drawn * 1000).round().unique(return_counts=True)
        assert entries.tolist() == [200, 201, 202, 203]
        assert counts.min() > 900 and counts.max() < 1100
    else:
        assert abs(drawn.mean() - 0.2015) < 1e-4
    same = draw_between(schedule, low, low, Draws(0, 1, range(4000)), "end")
    torch.testing.assert_close(same, low, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "count", "message"),
    [
        (50, 8, "50 intervals cannot be divided into 8 segments; take 48"),
        (4, 8, "8 segments are more than the 4 intervals"),
    ],
)
def test_a_grid_that_the_segments_do_not_divide_is_refused(steps: int, count: int, message: str):
    with pytest.raises(UserError, match=message):
        cut([k / steps for k in range(steps + 1)], count)


def test_edges_that_do_not_ascend_are_refused():
    with pytest.raises(ValueError, match="ascend"):
        Segments((0.0, 0.5, 0.5))
