"""The two times of a step: their order, their rows, and their distribution."""

import pytest
import torch

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.two_times import TwoTimes

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"flow": FlowSchedule(), "table": TABLE, "edm": EDMSchedule()}


def two_times(schedule: NoiseSchedule, **settings) -> TwoTimes:
    """MeanFlow's, up to pure noise or what comes nearest."""
    highest = schedule.flow_time(torch.ones(1, dtype=torch.float64)).item()
    return TwoTimes(schedule, low=1e-3, high=highest, **{"mean": -0.4, "std": 1.0, **settings})


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("r_mean", [None, -3.0], ids=["sorted", "apart"])
def test_the_second_time_is_never_behind_the_first_and_differs_where_it_shall(kind: str, r_mean: float | None):
    schedule = SCHEDULES[kind]
    t, r = two_times(schedule, r_mean=r_mean).draw(Draws(0, 0, range(500)), range(0, 500, 2))
    assert t.dtype == r.dtype == torch.float64
    assert bool((r <= t).all() and (t <= 1).all() and (r >= 0).all() and (t > 0).all())
    assert torch.equal(t[1::2], r[1::2])
    assert float((r[::2] < t[::2]).double().mean()) > 0.9
    torch.testing.assert_close(t, schedule.snap(t), rtol=0, atol=0)
    if kind == "flow":
        expected = torch.sigmoid(torch.randn(100000, 2 if r_mean is None else 1) - 0.4).amax(1).median()
        assert float(t.median()) == pytest.approx(float(expected), abs=0.05)


def test_what_is_cleaner_than_the_lowest_time_is_the_clean_sample():
    t, r = two_times(FlowSchedule(), r_mean=-50.0).draw(Draws(0, 0, range(64)), range(64))
    assert bool((r == 0).all() and (t >= 1e-3).all())


def test_the_second_normal_has_its_own_spread_where_one_is_given():
    rows = range(4000)
    alike, narrow = (
        two_times(FlowSchedule(), r_mean=-3.0, r_std=std).draw(Draws(0, 0, rows), rows)[1] for std in (None, 0.1)
    )
    assert alike.logit().std().item() == pytest.approx(1.0, abs=0.1)
    assert narrow.logit().std().item() == pytest.approx(0.1, abs=0.01)


def test_both_times_are_shifted():
    plain, shifted = (
        two_times(FlowSchedule(), shift=shift).draw(Draws(0, 0, range(64)), range(64)) for shift in (1.0, 3.0)
    )
    for before, after in zip(plain, shifted, strict=True):
        inside = (before > 2e-3) & (before < 0.99)
        torch.testing.assert_close(after[inside], (3 * before / (1 + 2 * before))[inside])
