"""The embedded judge: its reference agrees with its own statistics, and real pictures score near the floor."""

import pytest
import torch

from fewstep import fashion
from fewstep.eval.features import FashionExtractor, fashion_reference
from fewstep.eval.judge import Judge
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.frechet import feature_statistics, frechet
from fewstep.fashion.files import manifest

pytestmark = pytest.mark.skipif("floors" not in manifest(), reason="the embedded files are not built")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(FashionExtractor(), fashion_reference())


def test_the_reference_is_that_of_the_extractor(judge):
    reference = judge.reference
    assert reference.features.shape == (10_000, 64) and reference.labels.bincount().tolist() == [1000] * 10
    mean, covariance = feature_statistics(reference.features)
    # The statistics were taken before the features were rounded to half precision.
    assert torch.allclose(mean, reference.mean, atol=1e-2) and torch.allclose(
        covariance, reference.covariance, atol=1e-2
    )
    assert next(iter(reference.floors.values())) == fashion.reference().floors["real"] and len(reference.floors) == 2
    assert judge.extractor.sha256 == fashion.reference().classifier_sha256 and reference.count == 10_000


def test_real_pictures_score_well_and_spoilt_ones_badly(judge):
    images, labels = fashion.training_images()
    chosen = torch.arange(0, 10_000, 10)
    real = judge.extractor(images[chosen])
    assert real.features.shape == (1000, 64) and agreement(real.logits, labels[chosen]) > 0.9
    spoilt = judge.extractor((images[chosen].float() * 0.5).byte())
    assert frechet(real.features, judge.reference) < 0.5 * frechet(spoilt.features, judge.reference)


def test_colour_is_judged_by_its_luma(judge):
    images = fashion.training_images()[0][:4]
    assert judge.extractor.accepts((3, 32, 32)) and not judge.extractor.accepts((3, 64, 64))
    grey, colour = judge.extractor(images), judge.extractor(images.repeat(1, 3, 1, 1))
    assert torch.allclose(grey.features, colour.features, atol=1e-4)
