"""Kernel distances, density and coverage, FD-infinity, patches, memorisation, diversity and errors: closed forms."""

import math

import pytest
import torch

from fewstep.eval.metrics.cmmd import cmmd
from fewstep.eval.metrics.distances import distances
from fewstep.eval.metrics.fd_infinity import fd_infinity
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.memorisation import memorisation, nearest
from fewstep.eval.metrics.pair_diversity import pair_diversity
from fewstep.eval.metrics.patch_fid import centre_patches
from fewstep.eval.metrics.prdc import density_coverage
from fewstep.eval.metrics.precision_recall import manifold_radii, precision_recall
from fewstep.eval.metrics.uncertainty import jackknife_error, standard_error


def gaussian(num: int, width: int = 8, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_equal_rows_are_no_way_apart():
    rows = 100 + gaussian(30, 64)
    apart = distances(rows, rows)
    assert torch.equal(apart.diag(), torch.zeros(30, dtype=torch.float64))
    exact = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.allclose(apart, exact, atol=1e-9)


# --- kernel distances -------------------------------------------------------------------------------------------------


def kid_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """Sums over pairs, as the formula has them."""

    def kernel(a, b):
        return (float(a.double() @ b.double()) / len(a) + 1) ** 3

    size = len(x)
    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(size) for j in range(size) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return within / (size * (size - 1)) - 2 * across / size**2


def test_kid_is_its_formula():
    x, y = gaussian(12), gaussian(12, seed=1, shift=0.5)
    assert kid(x, y) == pytest.approx((kid_by_hand(x, y), 0.0), rel=1e-12)


def test_kid_of_one_law_is_zero_on_average_and_of_one_set_negative():
    """Means of many: unbiased. Features of unit variance have k(x, x) = 8 on the diagonal, which one sum lacks."""
    found = [kid(gaussian(20, seed=2 * i), gaussian(20, seed=2 * i + 1))[0] for i in range(200)]
    error = torch.tensor(found).std().item() / math.sqrt(200)
    assert abs(sum(found) / 200) < 3 * error
    x = gaussian(20)
    assert kid(x, x)[0] == pytest.approx(kid_by_hand(x, x)) and kid(x, x)[0] < -0.1


def test_kid_subsets_are_seeded_and_no_larger_than_the_smaller_set():
    x, y = gaussian(60), gaussian(50, seed=1, shift=0.5)
    few = kid(x, y, subsets=8, size=20)
    assert few == kid(x, y, subsets=8, size=20) and few != kid(x, y, subsets=8, size=20, seed=1)
    whole, none = kid(x[:50], y)
    assert none == 0
    assert few[1] > 0 and abs(few[0] - whole) < 3 * few[1]
    mean, spread = kid(x, y, subsets=8)  # 50 of each
    assert 0 < spread < few[1] and abs(mean - whole) < 0.2
    with pytest.raises(ValueError, match="at least 2 samples"):
        kid(x[:1], y)
    with pytest.raises(ValueError, match="width 8 and a reference of width 4"):
        kid(x, gaussian(10, 4))


def test_cmmd_of_two_points_has_its_closed_form_and_chunks_change_nothing():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert cmmd(one, other) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)
    x = torch.nn.functional.normalize(gaussian(30), dim=1)
    y = torch.nn.functional.normalize(gaussian(40, seed=1, shift=0.3), dim=1)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    assert cmmd(x, y, chunk=7) == pytest.approx(cmmd(x, y), rel=1e-10)
    assert cmmd(x, y) == pytest.approx(cmmd(y, x), rel=1e-10)
    kernels = [
        torch.exp(-torch.cdist(a.double(), b.double()).square() / 200).mean() for a, b in ((x, x), (y, y), (x, y))
    ]
    assert cmmd(x, y) == pytest.approx(1000 * (kernels[0] + kernels[1] - 2 * kernels[2]).item(), rel=1e-9)
    for bad in (x[:0], gaussian(3, 4)):
        with pytest.raises(ValueError):
            cmmd(x, bad)


def test_cmmd_of_few_samples_is_too_large_by_what_is_said():
    sets = [torch.nn.functional.normalize(gaussian(25, seed=i), dim=1) for i in range(40)]
    found = sum(cmmd(sets[2 * i], sets[2 * i + 1]) for i in range(20)) / 20
    kernel = torch.exp(-distances(sets[0], sets[1]).square() / 200).mean().item()
    assert found == pytest.approx(1000 * (1 - kernel) * 2 / 25, rel=0.15)


# --- density and coverage ---------------------------------------------------------------------------------------------


def line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_density_and_coverage_by_hand():
    """On a line 0, 1, 3, 7 with k = 1 the spheres have radii 1, 1, 2, 4."""
    reference = line(0, 1, 3, 7)
    # 0.5 is in the spheres of 0 and 1; 3.5 in those of 3 and 7; 20 in none: four hits of three samples.
    assert density_coverage(line(0.5, 3.5, 20), reference, k=1) == pytest.approx((4 / 3, 1.0))
    assert density_coverage(line(20, 30), reference, k=1) == (0.0, 0.0)
    # On a sphere is outside: 5 is 2 from 3, whose radius is 2, and inside the sphere of 7.
    assert density_coverage(line(5), reference, k=1) == pytest.approx((1.0, 0.25))


def test_density_and_coverage_of_one_law_and_of_one_set():
    x, y = gaussian(600), gaussian(600, seed=1)
    density, coverage = density_coverage(y, x)
    assert density == pytest.approx(1, abs=0.1) and coverage == pytest.approx(1 - 2**-5, abs=0.03)
    assert density_coverage(x, x) == pytest.approx((1.0, 1.0), abs=1e-12)
    assert density_coverage(y, x, chunk=7) == density_coverage(y, x)
    assert density_coverage(y, x, manifold_radii(x, 5)) == density_coverage(y, x)


def test_rounding_puts_no_neighbour_inside_the_sphere_that_it_lies_on():
    """Radii and distances from products of other shapes, whose last digits differ."""
    x = 3 + gaussian(400, 50)
    for chunk in (1, 7, 100):
        assert density_coverage(x, x, manifold_radii(x, 5, chunk=chunk)) == (1.0, 1.0)


def test_density_and_coverage_see_what_precision_and_recall_miss():
    """One outlier of the reference stretches its manifold over bad samples."""
    reference = torch.cat([gaussian(200, 2), torch.tensor([[60.0, 0.0]])])
    bad = torch.cat([gaussian(100, 2, seed=1), 0.3 * gaussian(100, 2, seed=2) + torch.tensor([40.0, 0.0])])
    assert precision_recall(bad, reference)[0] > 0.95
    assert density_coverage(bad, reference)[0] < 0.7


def test_ties_and_too_few_neighbours():
    equal = torch.zeros(10, 3)
    # Spheres of radius zero hold nothing, not even copies of their middle.
    assert density_coverage(equal, equal) == (0.0, 0.0)
    assert precision_recall(equal, equal) == (1.0, 1.0)
    # k + 1 rows have a k-th neighbour.
    assert density_coverage(gaussian(3), gaussian(6))[1] <= 1
    with pytest.raises(ValueError, match="5 samples have no 5-th nearest neighbour"):
        density_coverage(gaussian(3), gaussian(5))
    with pytest.raises(ValueError, match="need a generated sample"):
        density_coverage(gaussian(0), gaussian(9))


# --- FD-infinity ------------------------------------------------------------------------------------------------------


def test_fd_infinity_takes_most_of_the_bias_away():
    """Of the law of the reference itself, whose distance is 0 and whose plain estimates are all above."""
    mean, covariance = torch.zeros(16), torch.eye(16)
    sets = [gaussian(600, 16, seed=seed) for seed in range(12)]
    plain = [frechet_distance(*feature_statistics(features), mean, covariance) for features in sets]
    lines = [fd_infinity(features, mean, covariance)[0] for features in sets]
    assert min(plain) > 0.05 and abs(sum(lines)) < 0.25 * sum(plain)
    features = sets[0]
    found, error = fd_infinity(features, mean, covariance)
    assert 0 < error < plain[0]
    assert fd_infinity(features, mean, covariance) == (found, error)
    assert fd_infinity(features, mean, covariance, seed=1)[0] != found
    shifted, _ = fd_infinity(features + 1, mean, covariance)
    assert shifted == pytest.approx(16, rel=0.1)
    with pytest.raises(ValueError, match="at least 30 samples"):
        fd_infinity(features[:29], mean, covariance)


def test_the_line_and_its_error_are_those_of_least_squares(monkeypatch):
    """Distances that lie on a known line with known residuals: y = 3 + 2 x + e with e orthogonal to 1 and x."""
    from fewstep.eval.metrics import fd_infinity as module

    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    residuals = torch.tensor([1.0, -1.0, -1.0, 1.0]).double()
    intercept, error = module._at_zero(x, 3 + 2 * x + residuals)
    assert intercept == pytest.approx(3)
    # s² = 4/2, variance of the intercept s² (1/4 + 2.5² / 5).
    assert error == pytest.approx(math.sqrt(2 * (0.25 + 6.25 / 5)))


# --- patches ----------------------------------------------------------------------------------------------------------


def test_patches_are_the_middle_as_torchvision_cuts_it():
    functional = pytest.importorskip("torchvision.transforms.functional")
    for size in ((512, 512), (1024, 768), (513, 600)):
        images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).byte()
        patches = centre_patches(images)
        assert patches.shape == (2, 3, 299, 299) and torch.equal(patches, functional.center_crop(images, [299, 299]))
    with pytest.raises(ValueError, match="at least 512 pixels on a side, not 512x511"):
        centre_patches(torch.zeros(1, 3, 512, 511))


# --- memorisation -----------------------------------------------------------------------------------------------------


def test_nearest_training_images_by_hand():
    found, which = nearest(line(0.4, 9, 5), line(0, 4, 10), chunk=2)
    assert torch.allclose(found, torch.tensor([0.4, 1, 1]).double(), atol=1e-6) and which.tolist() == [0, 2, 1]
    assert memorisation(line(0.5, 9, 5), line(0, 4, 10)) == pytest.approx((1.0,))
    with pytest.raises(ValueError, match="no training images"):
        nearest(line(1), line())


def test_copies_are_seen_and_learning_is_not():
    training, held_out = gaussian(400), gaussian(300, seed=1)
    _, ratio, copies = memorisation(gaussian(300, seed=2), training, held_out)
    assert ratio == pytest.approx(1, abs=0.1) and copies == pytest.approx(0.05, abs=0.04)
    median, ratio, copies = memorisation(training[:200] + 1e-3, training, held_out)
    assert median < 0.01 and ratio < 0.01 and copies == 1
    half = torch.cat([training[:150], gaussian(150, seed=2)])
    assert memorisation(half, training, held_out)[2] == pytest.approx(0.525, abs=0.03)
    with pytest.raises(ValueError, match="among the training images"):
        memorisation(half, training, training[:100])
    with pytest.raises(ValueError, match="need a sample"):
        memorisation(half, training, training[:0])


# --- diversity and errors ---------------------------------------------------------------------------------------------


def test_pair_diversity_is_the_mean_over_pairs_and_prompts():
    features, groups = gaussian(30), torch.arange(30) % 4
    expected = []
    for group in range(4):
        rows = torch.nn.functional.normalize(features[groups == group].double(), dim=1)
        pairs = [1 - float(rows[i] @ rows[j]) for i in range(len(rows)) for j in range(i)]
        expected.append(sum(pairs) / len(pairs))
    value, error = pair_diversity(features, groups)
    values = torch.tensor(expected, dtype=torch.float64)
    assert value == pytest.approx(values.mean().item(), rel=1e-10)
    assert error == pytest.approx(values.std().item() / 2, rel=1e-10)
    assert pair_diversity(features * torch.rand(30, 1).add(0.1), groups)[0] == pytest.approx(value, rel=1e-6)


def test_pair_diversity_of_collapse_and_of_one_prompt():
    same = torch.ones(6, 4)
    assert pair_diversity(same, torch.arange(6) // 2) == pytest.approx((0, 0), abs=1e-12)
    features = gaussian(40)
    value, error = pair_diversity(features, torch.zeros(40))
    assert value == pytest.approx(1, abs=0.2) and 0 < error < 0.2
    assert pair_diversity(features[:3], torch.tensor([0, 0, 1]))[0] > 0  # the third has no partner
    assert math.isnan(pair_diversity(features[:2], torch.zeros(2))[1])
    with pytest.raises(ValueError, match="no prompt has two samples"):
        pair_diversity(features, torch.arange(40))
    with pytest.raises(ValueError, match="length zero"):
        pair_diversity(torch.zeros(4, 3), torch.zeros(4))


def test_errors_of_a_mean_agree():
    values = gaussian(80, 1)[:, 0]
    expected = values.std().item() / math.sqrt(80)
    assert standard_error(values) == pytest.approx(expected, rel=1e-6)
    assert jackknife_error(lambda kept: values[kept].mean(), 80) == pytest.approx(expected, rel=1e-5)
    assert math.isnan(standard_error(values[:1]))
    with pytest.raises(ValueError, match="needs at least"):
        jackknife_error(lambda rows: 0.0, 1)
