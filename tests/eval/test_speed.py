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


def test_median_and_p90(clock):
    durations = iter([100.0, 100.0, *range(1, 11)])

    def call() -> None:
        clock[0] += next(durations)

    found = speed.latency(call, device=torch.device("cpu"), calls=10, budget=1e9)
    assert (found.median, found.p90, found.calls) == (5.5, 9.0, 10)


def test_the_budget_leaves_at_least_one_timed_call(clock):
    def call() -> None:
        clock[0] += 7

    assert speed.latency(call, device=torch.device("cpu"), budget=1).calls == 1
    assert speed.latency(call, device=torch.device("cpu"), budget=30).calls == 3


def test_throughput_leaves_out_the_warm_up_and_the_rest():
    assert speed.throughput([(8, 9.0), (8, 2.0), (8, 2.0), (3, 0.1)], 8) == 4
    with pytest.raises(ValueError, match="two batches of 8"):
        speed.throughput([(8, 2.0), (3, 2.0)], 8)


def test_conditions_are_recorded():
    found = speed.conditions(tiny_ddim())
    assert found["dtype"] == "float32" and found["threads"] == torch.get_num_threads() and "torch" in found
