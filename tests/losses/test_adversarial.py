"""The GAN losses are the non-saturating logistic ones, and hinges."""

import math

import pytest
import torch

from fewstep.losses.adversarial import (
    clamped_cross_entropy,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    weighted_mean,
)


def test_an_undecided_discriminator_costs_log_two_per_term():
    zeros = torch.zeros(5, dtype=torch.float64)
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))


def test_they_are_cross_entropies_with_the_right_labels():
    real, fake = torch.randn(2, 7, dtype=torch.float64)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(generator_loss(fake), entropy(fake, torch.ones_like(fake)))
    expected = entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)


def test_half_precision_logits_are_raised_to_float32():
    logits = torch.tensor([30.0, -30.0], dtype=torch.bfloat16)
    assert generator_loss(logits).dtype == torch.float32
    assert discriminator_loss(logits, -logits).dtype == torch.float32


def test_hinges_ask_for_a_margin_of_one_and_no_more():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx((4 + 0.75) / 2)
    assert hinge_generator_loss(fake.bfloat16()).dtype == torch.float32


def test_clamped_cross_entropy_is_the_mean_over_a_samples_clamped_logits():
    logits = torch.tensor([[30.0, -1.0], [0.5, -40.0]], dtype=torch.float64)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    for real in (True, False):
        clamped = logits.clamp(-10, 10)
        expected = entropy(clamped, torch.full_like(clamped, float(real)), reduction="none").mean(1)
        torch.testing.assert_close(clamped_cross_entropy(logits, real), expected)
    assert clamped_cross_entropy(logits.bfloat16(), real=True).dtype == torch.float32


def test_a_mean_over_the_batch_comes_before_the_weights():
    losses, weight = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert weighted_mean(losses, weight, over_batch=False).item() == pytest.approx((2 + 1.5) / 2)
    assert weighted_mean(losses, weight, over_batch=True).item() == pytest.approx(2 * 1.25)
