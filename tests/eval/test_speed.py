"""Timing arithmetic, on a clock that the test moves."""

import pytest
import torch
from toy_models import tiny_ddim

from fewstep.eval import speed


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, durations):
    left = iter(durations)

    def call() -> None:
        clock[0] += next(left)

    return call


def test_median_and_p90(clock):
    call = taking(clock, [100.0, *range(1, 11)])  # the first call is a warm-up
    (found,) = speed.side_by_side([call], device=torch.device("cpu"), rounds=10, budget=1e9)
    assert (found.median, found.p90, found.rounds, found.ratio) == (5.5, 9.0, 10, None)


def test_the_budget_leaves_at_least_one_round(clock):
    def timed(budget: float) -> int:
        call = taking(clock, [7.0] * 9)
        return speed.side_by_side([call], device=torch.device("cpu"), rounds=8, budget=budget)[0].rounds

    assert timed(1) == 1 and timed(30) == 4


def test_ratios_are_those_of_one_round_on_a_machine_that_slows_down(clock):
    load = [1.0, 1.0, 3.0, 9.0, 27.0]  # of the warm-up, and of four rounds
    teacher, student = taking(clock, [8 * one for one in load]), taking(clock, [2 * one for one in load])
    own, other = speed.side_by_side([teacher, student], device=torch.device("cpu"), rounds=4, budget=1e9, baseline=0)
    assert (own.ratio, other.ratio, other.low, other.high) == (None, 4.0, 4.0, 4.0)
    assert other.median == 12.0


def test_ratios_come_with_their_quartiles(clock):
    teacher, student = taking(clock, [1.0] + [12.0] * 5), taking(clock, [1.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    _, other = speed.side_by_side([teacher, student], device=torch.device("cpu"), rounds=5, budget=1e9, baseline=0)
    assert (other.low, other.ratio, other.high) == (3.0, 4.0, 6.0)


def test_nothing_to_time_is_no_timing():
    assert speed.side_by_side([], device=torch.device("cpu")) == []
    with pytest.raises(ValueError, match="at least one round"):
        speed.side_by_side([], device=torch.device("cpu"), rounds=0)


def test_conditions_are_recorded():
    found = speed.conditions(tiny_ddim())
    assert found["dtype"] == "float32" and found["threads"] == torch.get_num_threads() and "torch" in found
