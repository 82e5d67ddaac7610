"""The GAN losses are the non-saturating logistic ones."""

import math

import pytest
import torch

from fewstep.losses.adversarial import discriminator_loss, generator_loss


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
