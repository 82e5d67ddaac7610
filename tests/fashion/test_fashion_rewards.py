"""The small rewards of the embedded teachers, on the embedded images."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import UserError
from fewstep.fashion import PROMPTS, training_images
from fewstep.fashion.rewards import ClassLikelihood, ClassProbability


@pytest.fixture(scope="module")
def shown() -> tuple[torch.Tensor, list[str]]:
    images, labels = training_images()
    some = torch.arange(0, 10000, 100)
    return images[some].float() / 255, [PROMPTS[label] for label in labels[some].tolist()]


@pytest.mark.parametrize(("kind", "own", "others"), [(ClassProbability, 0.9, 0.1), (ClassLikelihood, -0.6, -1.0)])
def test_real_pictures_fit_their_own_prompt_and_no_other(kind, own: float, others: float, shown):
    pictures, prompts = shown
    reward = kind("cpu")
    turned = [PROMPTS[(PROMPTS.index(prompt) + 5) % 10] for prompt in prompts]
    assert reward(pictures, prompts).mean() > own
    assert reward(pictures, turned).mean() < others
    torch.testing.assert_close(reward(pictures.expand(-1, 3, -1, -1), prompts), reward(pictures, prompts))
    labels = [PROMPTS.index(prompt) for prompt in prompts]
    assert torch.equal(reward(pictures, labels), reward(pictures, prompts))


@pytest.mark.parametrize("kind", [ClassProbability, ClassLikelihood])
def test_the_gradient_leads_to_a_higher_reward_and_reaches_no_weight(kind, shown):
    pictures, prompts = shown
    reward = kind("cpu")
    noisy = (0.7 * pictures + 0.3 * torch.rand(pictures.shape, generator=torch.Generator().manual_seed(0)))[:20]
    noisy.requires_grad_()
    before = reward(noisy, prompts[:20])
    (gradient,) = torch.autograd.grad(before.sum(), noisy)
    after = reward(noisy + 0.05 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1), prompts[:20])
    assert after.mean() > before.mean()
    assert gradient.flatten(1).norm(dim=1).min() > 0


@pytest.mark.parametrize("asked", [None, [], ["a cat"], [10]])
def test_what_is_no_class_is_refused(asked):
    with pytest.raises(UserError, match="ten prompts"):
        ClassProbability("cpu")(torch.zeros(1, 1, 32, 32), asked)
