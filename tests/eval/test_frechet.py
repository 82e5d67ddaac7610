"""The Fréchet distance against closed forms."""

import pytest
import torch

from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance


def test_diagonal_gaussians():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    variance1, variance2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    expected = 5.0 + ((variance1.sqrt() - variance2.sqrt()) ** 2).sum().item()
    assert frechet_distance(mean1, variance1.diag(), mean2, variance2.diag()) == pytest.approx(expected, abs=1e-12)


def test_rotated_gaussians_keep_their_distance():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    variance1 = torch.rand(5, generator=generator, dtype=torch.float64)
    variance2 = torch.rand(5, generator=generator, dtype=torch.float64)
    mean = torch.zeros(5)
    plain = frechet_distance(mean, variance1.diag(), mean, variance2.diag())
    covariance1, covariance2 = (rotation @ variance.diag() @ rotation.T for variance in (variance1, variance2))
    assert frechet_distance(mean, covariance1, mean, covariance2) == pytest.approx(plain, abs=1e-12)


def test_a_set_and_itself_and_symmetry_with_a_singular_covariance():
    first = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    second = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)) + 1
    one, two = feature_statistics(first), feature_statistics(second)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-6)


def test_statistics_do_not_lose_digits_to_a_large_mean():
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    _, covariance = feature_statistics(features)
    _, shifted = feature_statistics(features + 1e6)
    assert torch.allclose(covariance, shifted, atol=1e-8)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="N >= 2"):
        feature_statistics(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        feature_statistics(torch.full((3, 3), float("nan")))
    with pytest.raises(ValueError, match="expected shapes"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(2), torch.eye(2))
