"""Phases of the student's grid: they cover its steps, and each arrives where the next begins."""

from itertools import pairwise

import pytest
import torch

from fewstep.diffusion.phases import default_lengths, describe, make_phases
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.diffusion.timesteps import even_grid
from fewstep.errors import UserError


def test_wans_grid_in_two_phases():
    """Four steps shifted by 7: the second phase starts at 0.875, the boundary between Wan 2.2's two experts."""
    high, low = make_phases(even_grid(4, shift=7.0).tolist(), [2, 2])
    assert (high.steps, low.steps) == (range(2), range(2, 4))
    assert (high.start, high.anchor, low.start, low.anchor) == pytest.approx((1.0, 0.875, 0.875, None))
    assert 0.875 < high.lowest < even_grid(4, shift=7.0)[1]
    assert low.lowest == 0


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [1, 3], [2, 2], [4]])
def test_phases_follow_each_other(lengths: list[int]):
    phases = make_phases((1.0, 0.75, 0.5, 0.25), lengths)
    assert [step for phase in phases for step in phase.steps] == [0, 1, 2, 3]
    for one, following in pairwise(phases):
        assert one.anchor == following.start < one.lowest < (1.0, 0.75, 0.5, 0.25)[one.steps[-1]]
    assert phases[-1].anchor is None


@pytest.mark.parametrize("lengths", [[], [2, 1], [2, 3], [4, 0], [5, -1]])
def test_phases_that_do_not_cover_the_steps_are_refused(lengths: list[int]):
    with pytest.raises(UserError, match=r"do not cover the student's 4 steps.*\[2, 2\]"):
        make_phases((1.0, 0.75, 0.5, 0.25), lengths)


def test_the_default_is_two_halves():
    assert [default_lengths(n) for n in (1, 2, 3, 4, 8)] == [[1], [1, 1], [2, 1], [2, 2], [4, 4]]


def test_people_are_told_the_snr():
    phases = make_phases((1.0, 0.5), [1, 1])
    assert describe(phases, FlowSchedule()) == (
        "phase 1: 1 step, SNR -inf to 0.0 dB; phase 2: 1 step, SNR 0.0 dB to clean"
    )
    table = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
    for schedule in (table, EDMSchedule()):
        assert "nan" not in describe(phases, schedule)
