"""Rewards as losses: their forms, where a gradient ends, and the law that matching with a reward has its optimum at."""

from __future__ import annotations

import pytest
import torch

from fewstep.losses.reward import pair_distance, reward_loss, weighted_reward


def rewards() -> torch.Tensor:
    return torch.tensor([[1.0, 4.0], [3.0, -2.0], [0.5, 0.25]], dtype=torch.float64).requires_grad_()


def test_without_a_margin_the_loss_is_minus_the_mean_of_the_weighted_sum():
    r = rewards()
    loss = reward_loss(r, (2.0, 0.5))
    assert loss.item() == pytest.approx(-(2 + 2 + 6 - 1 + 1 + 0.125) / 3)
    (gradient,) = torch.autograd.grad(loss, r)
    torch.testing.assert_close(gradient, torch.tensor([[-2.0, -0.5]] * 3, dtype=torch.float64) / 3)


def test_one_margin_is_of_the_sum_and_leaves_those_above_it_in_peace():
    r = rewards()
    loss = reward_loss(r, (2.0, 0.5), (4.5,))  # sums 4, 5 and 1.125
    assert loss.item() == pytest.approx((0.5 + 0 + 3.375) / 3)
    (gradient,) = torch.autograd.grad(loss, r)
    torch.testing.assert_close(gradient[1], torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(gradient[0], torch.tensor([-2.0, -0.5], dtype=torch.float64) / 3)


def test_a_margin_for_each_reward_is_a_hinge_of_each():
    r = rewards()
    loss = reward_loss(r, (2.0, 0.5), (2.0, 1.0))
    assert loss.item() == pytest.approx((2 * (1 + 0 + 1.5) + 0.5 * (0 + 3 + 0.75)) / 3)
    (gradient,) = torch.autograd.grad(loss, r)
    expected = torch.tensor([[-2.0, 0.0], [0.0, -0.5], [-2.0, -0.5]], dtype=torch.float64) / 3
    torch.testing.assert_close(gradient, expected)


def test_another_number_of_margins_is_refused():
    with pytest.raises(ValueError, match="2 rewards have one margin"):
        reward_loss(rewards(), (1.0, 1.0), (1.0, 2.0, 3.0))


def test_half_precision_is_summed_in_float32():
    r = torch.full((2, 3), 1.0, dtype=torch.bfloat16)
    assert weighted_reward(r, (1e-3, 1.0, 1.0)).dtype == torch.float32
    torch.testing.assert_close(weighted_reward(r, (1e-3, 1.0, 1.0)), torch.full((2,), 2.001))


def test_matching_with_a_reward_has_its_optimum_at_the_tilted_law():
    """KL(N(mu, c^2) || N(m, s^2)) - b E a x is least at N(m + b s^2 a, s^2)."""
    m, s, a, b = 0.7, 1.3, 2.0, 0.4
    mean = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    spread = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)  # the logarithm
    nodes = torch.linspace(-1, 1, 8, dtype=torch.float64)
    nodes = nodes / nodes.square().mean().sqrt()
    optimizer = torch.optim.LBFGS([mean, spread], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        c = spread.exp()
        kl = torch.log(s / c) + (c.square() + (mean - m).square()) / (2 * s**2)
        loss = kl + b * reward_loss((a * (mean + c * nodes))[:, None], (1.0,))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert mean.item() == pytest.approx(m + b * s**2 * a, abs=1e-6)
    assert spread.exp().item() == pytest.approx(s, abs=1e-6)


def test_the_distance_of_pairs_is_a_root_mean_square_over_each_sample():
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([[3.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).view(2, 1, 2, 2)
    torch.testing.assert_close(pair_distance(a, b), torch.tensor([2.5, 1.0]))
