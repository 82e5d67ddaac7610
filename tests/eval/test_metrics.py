"""Metrics against closed forms and toy clusters."""

import pytest
import torch

from fewstep.eval.conditions import SampleConditions
from fewstep.eval.features import Features, Reference, to_grey
from fewstep.eval.judge import MetricInputs, numbers_of
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.diversity import diversity, within_class_spread
from fewstep.eval.metrics.estimate import Estimate, mean_of
from fewstep.eval.metrics.frechet import feature_statistics, frechet, frechet_distance
from fewstep.eval.metrics.precision_recall import manifold_radii, precision_recall
from fewstep.eval.metrics.table import IMAGE_METRICS, Metric


def reference(features: torch.Tensor, labels: torch.Tensor | None = None) -> Reference:
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    return Reference("toy", "FD-toy", "hash", features, labels, *feature_statistics(features), len(features))


def clusters(centres: list[float], n: int = 50, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([centre + 0.1 * torch.randn(n, 4, generator=generator) for centre in centres])


def test_frechet_of_diagonal_gaussians_has_its_closed_form():
    mean1, mean2 = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    std1, std2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    found = frechet_distance(mean1, torch.diag(std1**2), mean2, torch.diag(std2**2))
    assert float(found) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_of_a_set_to_itself_is_zero():
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert frechet(features, reference(features)) == pytest.approx(0, abs=1e-8)
    assert frechet(features + 1, reference(features)) == pytest.approx(16, rel=1e-6)


def test_too_few_samples_warn(caplog):
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    frechet(features[:31], reference(features))
    assert "mostly sampling bias" in caplog.text
    with pytest.raises(ValueError, match="at least 2"):
        frechet(features[:1], reference(features))


def test_precision_and_recall_of_clusters():
    real = clusters([0, 5, 10, 15])
    assert min(precision_recall(clusters([0, 5, 10, 15], seed=1), real)) > 0.8
    # Two of four clusters: everything generated is good, half of the real ones are missing.
    precision, recall = precision_recall(clusters([0, 5], n=100, seed=1), real)
    assert precision > 0.8 and 0.4 < recall <= 0.5
    # Half of the samples lie nowhere.
    precision, recall = precision_recall(clusters([0, 5, 10, 15, 100, 200, 300, 400], seed=1), real)
    assert 0.4 < precision <= 0.5 and recall > 0.8
    # One picture, again and again: precision is fooled, recall is not.
    precision, recall = precision_recall(real[:1].repeat(200, 1), real)
    assert precision == 1 and recall <= 0.01


def test_chunks_change_nothing():
    real, fake = clusters([0, 5]), clusters([0, 3], seed=1)
    assert precision_recall(fake, real, chunk=7) == precision_recall(fake, real)
    radii = manifold_radii(real)
    assert precision_recall(fake, real, reference_radii=radii) == precision_recall(fake, real)
    # By hand: on a line 0, 1, 3, 6, 10 the third neighbour of 0 is 6 away, that of 10 is 9 away.
    assert manifold_radii(torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]]))[[0, 4]].tolist() == [6, 9]
    with pytest.raises(ValueError, match="nearest neighbour"):
        manifold_radii(real[:3])


def test_agreement_counts_the_class_asked_for():
    logits = torch.eye(4)[[0, 1, 2, 2]]
    assert agreement(logits, torch.tensor([0, 1, 2, 3])) == 0.75


def test_diversity_is_the_spread_of_the_classes():
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 10 * labels[:, None]
    pairs = []
    for label in range(3):
        group = features[labels == label].double()
        pairs.append(torch.pdist(group).square().mean())
    assert within_class_spread(features, labels) == pytest.approx(float(torch.stack(pairs).mean()))
    real = reference(features, labels)
    assert diversity(features, labels, real) == pytest.approx(1)
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    assert diversity(means[labels] + 0.5 * (features - means[labels]), labels, real) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="two samples"):
        within_class_spread(features[:3], labels[:3])


def test_grey_comes_back_from_rgb():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.allclose(to_grey(grey.repeat(1, 3, 1, 1)), to_grey(grey), atol=1e-6)


# --- the table --------------------------------------------------------------------------------------------------------

FOUR = SampleConditions("label", (0, 1, 2, 3), (0, 1, 2, 3))


def toy_features(judge, count=12):
    return judge.extractor(torch.randint(0, 256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(2)).byte())


def inputs_of(judge, made, conditions=FOUR):
    columns = {"features": made.features} | ({} if made.logits is None else {"logits": made.logits})
    return MetricInputs(judge, columns.get, conditions)


def of_group(*groups):
    return [metric for metric in IMAGE_METRICS if metric.group in groups]


def test_metrics_need_what_there_is(judge):
    inputs = inputs_of(judge, toy_features(judge))
    assert all(hasattr(inputs, need) for metric in IMAGE_METRICS for need in metric.needs)


def test_a_further_metric_is_one_row(judge):
    def mean_logit(logits, labels):
        return Estimate(logits.mean().item(), 0.5), float(labels.max())

    row = Metric("mine", ("mean_logit", "last"), "fashion", mean_logit, ("logits", "labels"))
    made = toy_features(judge)
    numbers, spread, reasons = numbers_of([*of_group("agreement"), row], inputs_of(judge, made))
    assert list(numbers) == ["agreement", "mean_logit", "last"] and numbers["last"] == 3 and not reasons
    assert numbers["mean_logit"] == pytest.approx(made.logits.mean().item()) and spread["mean_logit"] == 0.5


def test_each_metric_that_cannot_be_computed_says_why(judge):
    made = toy_features(judge)
    embedded = of_group("fd_test", "agreement", "prdc", "diversity")
    unclassified = inputs_of(judge, Features(made.features, None))
    assert numbers_of(embedded, unclassified)[2]["agreement"] == "toy does not classify"
    unknown = inputs_of(judge, made, SampleConditions("prompt", ("a", "b")))
    reasons = numbers_of(embedded, unknown)[2]
    assert reasons["agreement"] == "the classes of these samples are not known"
    few = numbers_of(of_group("prdc"), inputs_of(judge, toy_features(judge, 3)))
    assert few[0] == {} and few[2] == {"prdc": "3 samples have no 3-th nearest neighbour; generate more"}
    nothing = MetricInputs(judge, {}.get, FOUR)
    assert numbers_of(of_group("prdc"), nothing)[2] == {"prdc": "toy takes images of another size"}


def test_frames_count_as_samples(judge):
    made = toy_features(judge).features
    videos = inputs_of(judge, Features(made.view(4, 3, 6), None))
    assert videos.features.equal(made) and videos.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert videos.subjects.tolist() == videos.labels.tolist()


def test_equal_prompts_are_one_subject():
    assert SampleConditions("prompt", ("a", "b", "a")).subjects(5).tolist() == [0, 1, 0, 0, 1]


def test_an_error_is_that_of_the_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    estimate = mean_of(values)
    assert estimate.value == 3.0 and estimate.error == pytest.approx((14 / 3 / 4) ** 0.5)
    assert mean_of(values[:1]).error is None
    with pytest.raises(ValueError, match="no number for every sample"):
        mean_of(torch.tensor([1.0, float("nan")]))
