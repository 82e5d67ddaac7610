"""Neighbouring times: LCM's grid, iCT's bins and ECT's pairs under every schedule, and what is never drawn."""

import pytest
import torch

from fewstep.diffusion.discretization import (
    EasyTimes,
    EvenTimes,
    LogNormalBins,
    SigmaRange,
    TimePair,
    karras_levels,
    lognormal_bins,
)
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.losses.consistency import weight

TABLE = TableSchedule(
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
)
SCHEDULES = {"table": TABLE, "flow": FlowSchedule(), "edm": EDMSchedule()}


def draws(count: int = 512, step: int = 0) -> Draws:
    return Draws(0, step, range(count))


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_and_times_are_inverse(name: str):
    levels = SigmaRange(SCHEDULES[name])
    sigma = torch.tensor([0.05, 0.3, 1.0, 7.0], dtype=torch.float64)
    torch.testing.assert_close(levels.at(levels.time(sigma)), sigma, rtol=2e-2 if name == "table" else 1e-9, atol=0)


def test_the_ends_of_a_schedule_stand_for_everything_beyond_them():
    flow = SigmaRange(FlowSchedule())
    assert flow.time(torch.tensor([1e-4, 80.0, 1e4], dtype=torch.float64)).tolist() == [0, 1, 1]
    assert flow.at(torch.ones(1)).item() == 1e6
    table = SigmaRange(TABLE, top=0.4)
    assert table.time(torch.tensor([1e-4, 1e4], dtype=torch.float64)).tolist() == [0.001, 0.4]


def test_a_table_that_ends_in_pure_noise_has_a_finite_top():
    ended = TABLE.alphas_cumprod.clone()
    ended[-1] = 0
    levels = SigmaRange(TableSchedule(ended))
    assert levels.sigma_max == 80
    assert levels.time(torch.tensor([80.0], dtype=torch.float64)).item() == 1


def test_pure_noise_counts_as_the_largest_level():
    """Its own is infinite, and a weight such as 1 / (t - r) would be nothing at the time that sampling starts from."""
    ended = TABLE.alphas_cumprod.clone()
    ended[-1] = 0
    levels = SigmaRange(TableSchedule(ended))
    pair = levels.between(torch.tensor([80.0, 79.0]).double(), torch.tensor([70.0, 1.0]).double())
    assert pair.t.tolist() == [1.0, 1.0] and pair.sigma_t.tolist() == [80.0, 80.0]
    assert bool((pair.sigma_r < pair.sigma_t).all() and (weight("1/(t-r)", pair.sigma_t, pair.sigma_r) > 0.01).all())


def test_a_gap_that_shrinks_fast_stops_before_rounding():
    for schedule in SCHEDULES.values():
        times = EasyTimes(SigmaRange(schedule), 1, q=256.0)
        pair = times.neighbours(torch.linspace(-2, 2, 41), 7)
        assert bool((pair.sigma_r < pair.sigma_t).all())
        assert bool(torch.isfinite(weight("1/(t-r)", pair.sigma_t, pair.sigma_r)).all())


# --- even grids -------------------------------------------------------------------------------------------------------


def test_fifty_intervals_of_a_table_are_lcms_grid():
    times = EvenTimes(SigmaRange(TABLE), [51]).times(0)
    assert TABLE.timestep(times).round().tolist() == [0, *range(19, 1000, 20)]


def test_forty_times_of_edm_are_the_karras_ramp():
    schedule = EDMSchedule()
    times = EvenTimes(SigmaRange(schedule), [40]).times(0)
    torch.testing.assert_close(schedule.coefficients(times).sigma, karras_levels(40, 0.002, 80.0))


def test_the_times_that_the_student_visits_are_on_the_grid_and_no_two_are_nearly_one():
    visited = [1.0, 0.9000000001, 0.75, 0.5, 0.8333333]
    grid = EvenTimes(SigmaRange(FlowSchedule()), [51], 3.0, visited)
    times = grid.times(0)
    assert set(visited) <= set(times.tolist())
    assert times.diff().min() > 1e-4
    assert times[0] == 0 and times[-1] == 1
    table = EvenTimes(SigmaRange(TABLE), [51], 1.0, [1.0, 0.75, 0.5, 0.25]).times(0)
    assert TABLE.timestep(table).round().long().tolist() == sorted({0, *range(19, 1000, 20), 249, 749})


def test_a_finer_grid_than_the_table_is_the_table():
    times = EvenTimes(SigmaRange(TABLE), [5000]).times(0)
    assert len(times) == 1000


def test_each_interval_of_an_even_grid_is_drawn_alike():
    grid = EvenTimes(SigmaRange(FlowSchedule()), range(5, 9), count=lambda step: 5 + step)
    pair = grid.draw(0, draws(4000))
    counts = [(pair.t == t).sum().item() for t in grid.times(0)[1:]]
    assert sum(counts) == 4000 and min(counts) > 900
    assert len(grid.draw(3, draws(4000)).t.unique()) == 7


# --- iCT and ECT ------------------------------------------------------------------------------------------------------


def every(schedule: NoiseSchedule, step: int = 0) -> dict[str, TimePair]:
    levels = SigmaRange(schedule)
    return {
        "ict": LogNormalBins(levels, lambda step: 10 * 2 ** min(step, 7) + 1).draw(step, draws()),
        "ect": EasyTimes(levels, 1).draw(step, draws()),
        "even": EvenTimes(levels, range(11, 122, 11), count=lambda step: 11 * (step + 1)).draw(step, draws()),
    }


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [0, 2, 9])
def test_a_neighbour_lies_below_and_both_are_times_that_the_network_knows(name: str, step: int):
    schedule = SCHEDULES[name]
    for pair in every(schedule, step).values():
        assert (pair.r < pair.t).all()
        assert (pair.sigma_r < pair.sigma_t).all()
        ended = pair.sigma_r == 0
        alpha, sigma = schedule.coefficients(pair.r[ended])
        torch.testing.assert_close(alpha, torch.ones_like(alpha))
        torch.testing.assert_close(sigma, torch.zeros_like(sigma), rtol=0, atol=1e-12)
        for value in vars(pair).values():
            assert value.dtype == torch.float64 and torch.isfinite(value).all()
        for t in (pair.t, pair.r[~ended]):
            torch.testing.assert_close(schedule.snap(t), t)


def test_bins_are_drawn_by_their_mass():
    levels = SigmaRange(EDMSchedule())
    pair = LogNormalBins(levels, lambda _step: 11).draw(0, draws(8000))
    edges = karras_levels(11, 0.002, 80.0)
    lower = torch.searchsorted(edges, pair.sigma_r + 1e-9) - 1
    torch.testing.assert_close(pair.sigma_t, edges[lower + 1])
    shares = torch.bincount(lower, minlength=10) / 8000
    torch.testing.assert_close(shares.double(), lognormal_bins(edges), rtol=0, atol=0.015)


def test_the_top_of_a_flow_is_trained_by_ict_and_ect():
    levels = SigmaRange(FlowSchedule())
    assert LogNormalBins(levels, lambda _step: 11).draw(0, draws(4000)).t.max() == 1
    assert EasyTimes(levels, 1).draw(0, draws(4000)).t.max() == 1


def test_ect_begins_as_denoising_and_comes_closer():
    levels = SigmaRange(FlowSchedule())
    shares, gaps = [], []
    for stage in range(8):
        pair = EasyTimes(levels, 1).draw(stage, Draws(0, 0, range(512)))
        shares.append((pair.sigma_r == 0).double().mean().item())
        gaps.append((1 - pair.sigma_r / pair.sigma_t).mean().item())
    assert shares[0] > 0.75 and shares[-1] == 0
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.02
    two = EasyTimes(levels, 2)
    assert torch.equal(two.draw(1, Draws(0, 0, range(8))).r, two.draw(0, Draws(0, 0, range(8))).r)
