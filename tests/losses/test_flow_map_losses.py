"""AnyFlow's weights by time, rebalancing and fused guidance, by their formulas."""

import pytest
import torch

from fewstep.diffusion.placed_times import time_table
from fewstep.losses.flow_map import TIME_WEIGHTS, fused_guidance, rebalanced, time_weight


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("kind", ["beta08", "gaussian"])
def test_a_weight_sums_to_its_entries_and_is_read_at_the_nearest(kind: str, shift: float):
    weight = time_weight(kind, time_table(1000, shift))
    assert float(weight.weights.sum()) == pytest.approx(1000) and float(weight.weights.min()) >= 0
    assert weight.weights[0] == 0  # pure noise: of beta08 by its root, of the gaussian as the smallest
    inside = weight.times[[3, 500, 997]]
    assert torch.equal(weight.at(inside + 1e-9), weight.weights[[3, 500, 997]])
    assert torch.equal(weight.at(torch.tensor([1.7, -0.3], dtype=torch.float64)), weight.weights[[0, -1]])


def test_the_uniform_weight_is_one_and_another_is_refused():
    assert torch.equal(time_weight("uniform", time_table(10, 5.0)).weights, torch.ones(11, dtype=torch.float64))
    with pytest.raises(ValueError, match="one of uniform, beta08, gaussian, not 'cosine'"):
        time_weight("cosine", time_table(10, 1.0))
    assert set(TIME_WEIGHTS) == {"uniform", "beta08", "gaussian"}


def test_rebalanced_losses_have_the_level_and_the_gradient_of_its_logarithm():
    each = torch.tensor([1.0, 3.0, 0.25, 8.0], dtype=torch.float64, requires_grad=True)
    apart = torch.tensor([False, False, True, True])
    level = each[:2].mean()
    brought = rebalanced(each, apart, level, 0.0)
    torch.testing.assert_close(brought, torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(brought.sum(), each)
    # Nothing flows through the level, which the first two make.
    torch.testing.assert_close(gradient, torch.tensor([1.0, 1.0, 2 / 0.25, 2 / 8.0], dtype=torch.float64))


def test_fused_guidance_is_met_by_the_guided_velocity():
    u_null, v, w = torch.tensor([0.3, -1.0]), torch.tensor([2.0, 0.5]), 3.0
    guided = (u_null + w * (v - u_null)).requires_grad_()
    fused = fused_guidance(guided, u_null.requires_grad_(), w)
    torch.testing.assert_close(fused, v)
    assert torch.autograd.grad(fused.sum(), (guided, u_null), allow_unused=True)[1] is None
