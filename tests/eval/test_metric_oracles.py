"""Our numbers beside those of the libraries that published comparisons use, where they are installed.

None of them is a dependency of the tests. With ``pip install torch-fidelity torchmetrics prdc clean-fid "scipy<1.18"``
nothing is skipped here, nor in test_inception.py.
"""

import pytest
import torch

from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.prdc import density_coverage
from fewstep.eval.metrics.precision_recall import precision_recall


def sets(width: int = 32, num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of different laws and, for what takes it, of different numbers."""
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(num, width, generator=draws, dtype=torch.float64)
    mix = torch.eye(width, dtype=torch.float64) + 0.1 * torch.randn(width, width, generator=draws, dtype=torch.float64)
    return first, torch.randn(num - 40, width, generator=draws, dtype=torch.float64) @ mix + 0.3


def test_kid_is_torch_fidelitys():
    metric = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity is not installed")
    fake, real = (rows[:200] for rows in sets())
    theirs = metric.kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kid(fake, real)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    # Of subsets, which each library draws in its own way: within three errors of the mean.
    drawn = metric.kid_features_to_metric(fake, real, kid_subsets=50, kid_subset_size=60, verbose=False)
    mean, spread = kid(fake, real, subsets=50, size=60)
    assert mean == pytest.approx(drawn["kernel_inception_distance_mean"], abs=3 * spread / 5)
    assert spread == pytest.approx(drawn["kernel_inception_distance_std"], rel=0.5)


def test_kid_is_torchmetrics():
    metric = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    fake, real = (rows[:200] for rows in sets())
    assert kid(fake, real)[0] == pytest.approx(metric.poly_mmd(real, fake).item(), rel=1e-9)


def test_kid_is_clean_fids():
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed")
    fake, real = (rows[:200].numpy() for rows in sets())
    theirs = fid.kernel_distance(real, fake, num_subsets=1)
    assert kid(torch.from_numpy(fake), torch.from_numpy(real))[0] == pytest.approx(theirs, rel=1e-9)


def test_frechet_is_torchmetrics():
    metric = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    statistics = [value for rows in sets() for value in feature_statistics(rows)]
    assert frechet_distance(*statistics) == pytest.approx(metric._compute_fid(*statistics).item(), rel=1e-9)


def test_density_and_coverage_are_prdcs():
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    fake, real = sets()
    theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    assert 0.1 < theirs["density"] < 0.9 and 0.1 < theirs["coverage"] < 0.9
    assert density_coverage(fake, real) == pytest.approx((theirs["density"], theirs["coverage"]), abs=1e-12)
    theirs = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=3)
    assert precision_recall(fake, real) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-12)


def test_where_prdc_differs():
    """It takes k + 2 samples of the reference, where k + 1 have a k-th neighbour."""
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    fake, real = sets()
    with pytest.raises(ValueError):
        prdc.compute_prdc(real[:6].numpy(), fake.numpy(), nearest_k=5)
    assert density_coverage(fake, real[:6])[1] <= 1
    theirs = prdc.compute_prdc(real[:7].numpy(), fake[:7].numpy(), nearest_k=5)
    assert density_coverage(fake[:7], real[:7]) == pytest.approx((theirs["density"], theirs["coverage"]), abs=1e-12)


def test_precision_and_recall_are_torch_fidelitys():
    metric = pytest.importorskip("torch_fidelity.metric_prc", reason="torch-fidelity is not installed")
    fake, real = sets()
    theirs = metric.prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=100, cuda=False, verbose=False
    )
    assert precision_recall(fake, real) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
