"""AnyFlow's two times: tied by place in the whole batch, and else the larger and the smaller of two uniforms."""

import pytest
import torch

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.placed_times import PlacedTimes, parts_of, spread_places, time_table
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"flow": FlowSchedule(), "table": TABLE, "edm": EDMSchedule()}


@pytest.mark.parametrize("total", [1, 3, 4, 8, 12, 32])
def test_every_split_of_a_batch_has_the_parts_of_the_whole(total: int):
    """However many processes and micro-batches share it."""
    places = spread_places(total)
    assert sorted(places) == list(range(total))
    whole = parts_of(places, total, 0.5, 0.25)
    assert (len(whole.equal), len(whole.zero)) == (round(0.5 * total), round(0.25 * total))
    assert sorted([*whole.equal, *whole.apart]) == list(range(total)) and {*whole.zero} <= {*whole.apart}
    for size in (size for size in range(1, total + 1) if total % size == 0):
        found = [parts_of(places[first : first + size], total, 0.5, 0.25) for first in range(0, total, size)]
        for part in ("equal", "zero", "apart"):
            rows = [size * k + row for k, one in enumerate(found) for row in getattr(one, part)]
            assert rows == getattr(whole, part)


def test_neighbours_share_the_parts():
    """Four neighbours of a batch of 32 are two with r = t, one with r = 0 and a free one."""
    for first in range(0, 32, 4):
        found = parts_of(spread_places(32)[first : first + 4], 32, 0.5, 0.25)
        assert (len(found.equal), len(found.zero), len(found.apart)) == (2, 1, 2)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_times_are_sorted_uniforms_shifted_and_tied(kind: str):
    schedule, count = SCHEDULES[kind], 400
    highest = schedule.flow_time(torch.ones(1, dtype=torch.float64)).item()
    parts = parts_of(range(count), count, 0.5, 0.25)
    t, r = PlacedTimes(schedule, 1e-3, highest, 3.0).draw(Draws(0, 0, range(count)), parts)
    first, second = (Draws(0, 0, range(count)).uniform(name) for name in ("t", "r"))
    top, low = (3 * u / (1 + 2 * u) for u in (torch.maximum(first, second), torch.minimum(first, second)))
    assert t.dtype == r.dtype == torch.float64 and bool((t <= 1).all() and (t > 0).all() and (r <= t).all())
    assert torch.equal(r[:200], t[:200]) and not r[200:300].any()
    expected = schedule.snap(schedule.time_from_flow_time(top.clamp(1e-3, highest)))
    torch.testing.assert_close(t, expected, rtol=0, atol=1e-12)
    free = slice(300, None)
    told = torch.where(
        low[free] < 1e-3, 0.0, schedule.snap(schedule.time_from_flow_time(low[free].clamp(1e-3, highest)))
    )
    torch.testing.assert_close(r[free], torch.minimum(told, t[free]), rtol=0, atol=1e-12)


def test_a_time_is_no_lower_than_the_lowest_and_a_second_one_below_it_is_the_clean_sample():
    count = 400
    t, r = PlacedTimes(FlowSchedule(), 0.3, 0.8).draw(Draws(0, 0, range(count)), parts_of(range(count), count, 0, 0))
    first, second = (Draws(0, 0, range(count)).uniform(name) for name in ("t", "r"))
    higher, lower = torch.maximum(first, second), torch.minimum(first, second)
    assert bool((higher < 0.3).any()) and bool((lower > 0.8).any())
    torch.testing.assert_close(t, higher.clamp(0.3, 0.8))
    torch.testing.assert_close(r, torch.where(lower < 0.3, 0.0, lower.clamp(max=0.8)))


def test_a_table_of_times_runs_from_one_to_zero():
    table = time_table(4, 3.0)
    torch.testing.assert_close(table, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64))
