"""MeanFlow's targets and weights against their formulas."""

import math

import pytest
import torch

from fewstep.losses.mean_flow import WEIGHTINGS, alpha_at, alpha_flow_target, mean_flow_target, weighted_loss


def test_the_target_is_the_velocity_where_the_two_times_are_one():
    velocity, change = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    gap = torch.tensor([0.0, 0.5], dtype=torch.float64)
    target = mean_flow_target(velocity, change, gap)
    assert torch.equal(target[0], velocity[0])
    torch.testing.assert_close(target[1], velocity[1] - 0.5 * change[1])
    torch.testing.assert_close(mean_flow_target(velocity, change, gap, 0.1)[1], velocity[1] - 0.05 * change[1])


@pytest.mark.parametrize(
    ("weighting", "gradient"),
    [
        ("uniform", lambda s, d, p, c: 1.0),
        ("sum", lambda s, d, p, c: (s + c) ** -p),
        ("sum_squared", lambda s, d, p, c: 2 * s / (s**2 + c) ** p),
        ("mean", lambda s, d, p, c: (s / d + c) ** -p / d),
        ("norm", lambda s, d, p, c: (math.sqrt(s) + c) ** -p),
    ],
)
def test_a_weight_is_held_fixed(weighting: str, gradient):
    """So that the gradient is that of the squared error, times one number for each sample."""
    u, target = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64)
    weighted_loss(u, target, weighting, 0.75, 0.01).sum().backward()
    for row in range(3):
        error = (u[row] - target[row]).detach()
        factor = gradient(float(error.square().sum()), 8, 0.75, 0.01)
        torch.testing.assert_close(u.grad[row], 2 * factor * error)


def test_no_gradient_flows_to_a_target_and_half_precision_is_widened():
    u, target = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    for weighting in WEIGHTINGS:
        loss = weighted_loss(u, target, weighting, 1.0, 1e-3)
        assert loss.dtype == torch.float32 and loss.shape == (2,)
        loss.sum().backward()
    assert target.grad is None
    with pytest.raises(ValueError, match="weighting is one of"):
        weighted_loss(u, target, "cube", 1.0, 1e-3)


def test_alpha_falls_from_one_to_zero_and_is_a_half_between():
    assert (alpha_at(0, 0, 100), alpha_at(50, 0, 100), alpha_at(100, 0, 100)) == (1.0, 0.5, 0.0)
    falling = [alpha_at(step, 20, 80) for step in range(100)]
    assert falling == sorted(falling, reverse=True)
    assert (falling[20], falling[80]) == (1.0, 0.0)
    assert all(value == 0 or 0.005 <= value <= 0.995 or value == 1 for value in falling)


def test_a_target_of_alpha_flow_comes_to_mean_flows():
    """On data of standard deviation s = 0.7: 5e-3, 5e-5 and 4e-7 off at alpha 0.1, 0.01 and 0.001."""
    t, r, s = 0.8, 0.3, 0.7
    z = torch.tensor([[1.3]], dtype=torch.float64)

    def spread(time: float) -> float:
        return math.sqrt((1 - time) ** 2 * s**2 + time**2)

    def average(z: torch.Tensor, r: float, t: float) -> torch.Tensor:
        return z * (1 - spread(r) / spread(t)) / (t - r)

    velocity = z * (t - (1 - t) * s**2) / spread(t) ** 2
    errors = []
    for alpha in (0.1, 0.01, 0.001):
        step = alpha * (t - r)
        target = alpha_flow_target(velocity, average(z - step * velocity, r, t - step), alpha)
        errors.append(float((target - average(z, r, t)).abs()))
    assert errors[0] < 1e-2
    assert errors[1] < 2e-2 * errors[0] and errors[2] < 2e-2 * errors[1]
    assert torch.equal(alpha_flow_target(velocity, z, 1.0), velocity)
    assert float(alpha_flow_target(100 * velocity, z, 1.0, 4.0).abs().max()) == 4.0


def test_a_gap_counts_between_zero_and_one():
    velocity, derivative = torch.randn(2, 3, 4, dtype=torch.float64)
    gap = torch.tensor([-0.5, 0.25, 1.5], dtype=torch.float64)
    expected = velocity - torch.tensor([[0.0], [0.25], [1.0]], dtype=torch.float64) * derivative
    torch.testing.assert_close(mean_flow_target(velocity, derivative, gap), expected)
