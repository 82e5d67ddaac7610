"""Consistency's pure functions: boundaries exact, the papers' constants and curricula, distances, their gradients."""

import math

import pytest
import torch
from diffusers import LCMScheduler

from fewstep.diffusion.discretization import (
    adaptive_decay,
    doubling_levels,
    ect_gap,
    ect_mapping,
    karras_levels,
    lognormal_bins,
    progressive_levels,
)
from fewstep.losses.consistency import (
    DISTANCES,
    WEIGHTINGS,
    distance,
    hard_boundary,
    lcm_scalings,
    shifted_edm_scalings,
    weight,
)
from fewstep.networks.guidance_embedding import guidance_embedding


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- boundaries -------------------------------------------------------------------------------------------------------


def test_every_boundary_gives_back_the_sample_itself():
    for skip, out in (
        lcm_scalings(f64(0)),
        shifted_edm_scalings(f64(0.002), 0.002),
        hard_boundary(f64(0.001), 0.001),
        hard_boundary(f64(0.0), 0.0),
    ):
        assert (skip.item(), out.item()) == (1.0, 0.0)


@pytest.mark.parametrize("scaling", [10.0, 1.0])
def test_lcm_scalings_are_those_of_the_stock_scheduler(scaling: float):
    stock = LCMScheduler(timestep_scaling=scaling)
    for timestep in (0, 1, 19, 499, 999):
        skip, out = lcm_scalings(f64(timestep), scaling)
        assert (skip.item(), out.item()) == pytest.approx(stock.get_scalings_for_boundary_condition_discrete(timestep))


def test_a_hard_boundary_is_x0_everywhere_else():
    skip, out = hard_boundary(f64(0.0, 1e-3, 0.5, 1.0), 0.0)
    assert skip.tolist() == [1, 0, 0, 0] and out.tolist() == [0, 1, 1, 1]
    assert hard_boundary(f64(0.0), -math.inf)[1].item() == 1


def test_shifted_scalings_differ_from_edms_by_the_least_noise_level():
    sigma = f64(0.1, 1.0, 80.0)
    skip, out = shifted_edm_scalings(sigma, 0.002)
    edm_skip, edm_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    torch.testing.assert_close(out / edm_out, 1 - 0.002 / sigma)
    torch.testing.assert_close(skip, edm_skip, rtol=5e-2, atol=0)


# --- distance and weight ----------------------------------------------------------------------------------------------


def test_distances_by_hand():
    a, b = torch.tensor([[[3.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[[0.0, 4.0]], [[1.0, 1.0]]])
    expected = {
        "mse": 12.5,
        "l1": 3.5,
        "l2_norm": 5.0,
        "l2_norm_squared": 25.0,
        "pseudo_huber_norm": math.sqrt(25 + 4) - 2,
        "pseudo_huber_elementwise": (math.sqrt(9 + 4) + math.sqrt(16 + 4)) / 2 - 2,
    }
    assert expected.keys() == set(DISTANCES)
    for kind, value in expected.items():
        assert distance(kind, a, b, c=2.0).tolist() == pytest.approx([value, 0.0])


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("c", [0.0, 0.03])
def test_equal_samples_have_a_gradient_that_is_a_number(kind: str, c: float):
    a = torch.ones(2, 3, requires_grad=True)
    distance(kind, a, torch.ones(2, 3), c).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_weights_by_hand():
    sigma_t, sigma_r = f64(2.0), f64(1.75)
    c_out = 1 / math.sqrt(4.25)
    expected = dict(zip(WEIGHTINGS, (1, 4.25, 4, 2, 1 / c_out, 4.25, 0.5, 0.25)))
    for kind, value in expected.items():
        assert weight(kind, sigma_t, sigma_r).item() == pytest.approx(value)


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match="unknown distance 'lpips'"):
        distance("lpips", torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="unknown weighting 'snr'"):
        weight("snr", f64(1), f64(0))


# --- curricula and mappings -------------------------------------------------------------------------------------------


def test_ict_doubles_its_levels_every_eighth_of_the_run():
    counts = [doubling_levels(step, 400_000) for step in range(0, 400_000, 50_000)]
    assert counts == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert [doubling_levels(step, 400_000) for step in (49_999, 50_000, 399_999)] == [11, 21, 1281]
    assert doubling_levels(3, 4, 10, 1280) == 81  # a run shorter than its curriculum


def test_ict_bins_of_eleven_levels():
    levels = karras_levels(11, 0.002, 80.0)
    expected = f64(0.002, 0.0167, 0.0851, 0.3183, 0.9654, 2.515, 5.839, 12.38, 24.41, 45.31, 80)
    torch.testing.assert_close(levels, expected, rtol=2e-3, atol=5e-5)
    shares = f64(0.0626, 0.1817, 0.2455, 0.2135, 0.1424, 0.0806, 0.0411, 0.0196, 0.0089, 0.0040)
    torch.testing.assert_close(lognormal_bins(levels), shares, rtol=0, atol=5e-5)


def test_ct_grows_its_levels_and_slows_its_target():
    assert [progressive_levels(step, 1000, 2, 150) for step in (0, 999)] == [2, 151]
    assert adaptive_decay(0, 1000) == pytest.approx(0.95**2)
    assert adaptive_decay(999, 1000) == pytest.approx(0.95 ** (2 / 150))


def test_ect_mapping_by_the_papers_table():
    sigma = f64(0.05, 0.5, 2, 20)
    assert (ect_mapping(sigma, ect_gap(0)) / sigma).tolist() == pytest.approx([0, 0, 0.023, 0.5], abs=1e-3)
    assert (ect_mapping(sigma, ect_gap(7)) / sigma).tolist() == pytest.approx([0.981, 0.984, 0.992, 0.996], abs=1e-3)
    assert (ect_mapping(sigma, ect_gap(2), k=0) / sigma).tolist() == pytest.approx([0.875] * 4)


def test_guidance_of_one_is_embedded_as_nothing():
    zero = guidance_embedding(f64(1.0, 8.0), 8)
    assert zero[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert zero[1, 0].item() == pytest.approx(math.sin(7000))
