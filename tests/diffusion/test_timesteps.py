"""Times to train at and grids to sample on."""

import pytest
import torch

from fewstep.diffusion.timesteps import (
    even_grid,
    logit_normal_times,
    shift_time,
    u_shaped_times,
    uniform_times,
    unshift_time,
)


@pytest.mark.parametrize(
    ("shift", "grid"),
    [
        (1.0, [1, 0.75, 0.5, 0.25]),
        (3.0, [1, 0.9, 0.75, 0.5]),
        (5.0, [1, 0.9375, 0.8333, 0.625]),
        (7.0, [1, 0.9545, 0.875, 0.7]),
    ],
)
def test_four_step_grids_are_the_published_ones(shift: float, grid: list[float]):
    torch.testing.assert_close(even_grid(4, shift), torch.tensor(grid, dtype=torch.float64), rtol=0, atol=5e-5)


def test_unshifting_inverts_shifting_and_the_ends_stay():
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    torch.testing.assert_close(unshift_time(shift_time(t, 4.2), 4.2), t, rtol=1e-12, atol=1e-15)
    assert shift_time(t, 4.2)[[0, -1]].tolist() == [0, 1]


def test_samplers_map_draws_monotonically_into_their_range():
    uniform = uniform_times(torch.linspace(0, 1, 11), 0.02, 0.98)
    assert uniform.dtype == torch.float64
    assert (uniform[0].item(), uniform[-1].item()) == pytest.approx((0.02, 0.98))
    assert logit_normal_times(torch.tensor([0.0])).item() == 0.5
    assert logit_normal_times(torch.tensor([0.0]), mean=1.0).item() == pytest.approx(0.7310586)
    assert (logit_normal_times(torch.linspace(-3, 3, 9), std=2.0).diff() > 0).all()


def test_u_shaped_times_have_the_moments_of_2_rectified_flow_pp():
    """Mean 0.5, variance 0.1157, and a density of 2.07 at the ends against 0.55 in the middle, at a = 4."""
    draws = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = u_shaped_times(draws)
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(t.var()) == pytest.approx(0.1157, abs=5e-5)
    for place, density in ((0.005, 2.07), (0.5, 0.55), (0.995, 2.07)):
        share = ((t - place).abs() < 0.005).double().mean() / 0.01
        assert float(share) == pytest.approx(density, rel=0.03)


def test_a_grid_needs_at_least_one_step():
    with pytest.raises(ValueError, match="at least 1"):
        even_grid(0)
