"""The pseudo-Huber distance and its constant."""

import math

import pytest
import torch

from fewstep.losses.huber import huber_constant, pseudo_huber


def test_it_is_a_square_near_zero_and_a_norm_far_from_it():
    direction = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    norm = direction.flatten(1).norm(dim=1)
    small = pseudo_huber(1e-6 * direction, c=1.0)
    torch.testing.assert_close(small, (1e-6 * norm) ** 2 / 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(pseudo_huber(1e6 * direction, c=1.0), 1e6 * norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(pseudo_huber(direction, c=0.0), norm)


def test_it_keeps_its_digits_where_samples_nearly_agree():
    exact = math.sqrt(4e-12 + 0.03**2) - 0.03
    assert pseudo_huber(torch.full((1, 4), 1e-6), 0.03).item() == pytest.approx(exact, rel=1e-4)


def test_its_constant_is_the_published_one():
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.0299, abs=5e-5)
    assert huber_constant(3 * 64 * 64) == pytest.approx(0.0599, abs=5e-5)
    assert huber_constant(3 * 32 * 32, scaling="released") == pytest.approx(1.66, abs=5e-3)
    with pytest.raises(ValueError, match="sqrt or released"):
        huber_constant(8, scaling="none")
