"""TwinFlow's losses against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.losses.twin_flow import DISTANCES, barron, distance, gap_weight, recursive_target


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return a.requires_grad_(), b


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_the_published_distance_is_about_a_root_whose_gradient_is_that_of_the_square_over_it(scale: float):
    a, b = pair()
    c = 1e-3
    b = a.detach() + scale * b
    mean = (a - b).square().flatten(1).mean(1)
    value = barron(a, b, eps=0.0)
    torch.testing.assert_close(value, mean / (mean + c**2).sqrt())
    (found,) = torch.autograd.grad(value.sum(), a, retain_graph=True)
    (of_mean,) = torch.autograd.grad(mean.sum(), a)
    expected = of_mean / (mean.detach() + c**2).sqrt()[:, None, None]
    torch.testing.assert_close(found, expected)
    # The released code's constant is 1 % more of c^2.
    torch.testing.assert_close(barron(a, b), mean / (mean / (1.01 * c**2) + 1).sqrt() / c)


@pytest.mark.parametrize(("alpha", "power"), [(2.0, 0.0), (0.0, -1.0), (-2.0, -2.0)])
def test_other_shapes_are_those_of_the_robust_loss(alpha: float, power: float):
    a, b = pair(1)
    mean, c = (a - b).square().flatten(1).mean(1), 0.3
    expected = mean / c * (mean / (c**2 * max(2 - alpha, 1e-9)) + 1) ** power
    torch.testing.assert_close(barron(a, b, alpha, c, 0.0), expected)
    assert torch.equal(distance("barron", a, b, alpha, c, 0.0), barron(a, b, alpha, c, 0.0))


def test_the_other_distances_are_those_of_consistency_models():
    a, b = pair(2)
    error = (a - b).flatten(1)
    torch.testing.assert_close(distance("mse", a, b), error.square().mean(1))
    torch.testing.assert_close(distance("pseudo_huber_norm", a, b, c=0.1), (error.square().sum(1) + 0.01).sqrt() - 0.1)
    assert len(DISTANCES) == 7


def test_weights_fall_with_the_gap():
    gap = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(gap_weight(gap), torch.tensor([4.077684, 1.726543, 1.0]).double(), atol=1e-6, rtol=0)
    assert gap_weight(gap).dtype == torch.float64 and math.isfinite(gap_weight(gap).sum())


def target(u: Tensor, velocity: Tensor, integral: Tensor, gap: float, far: bool, limit: float | None = 1.0) -> Tensor:
    size = len(u)
    gaps, steps = (torch.full((size,), value, dtype=torch.float64) for value in (gap, 0.01))
    return recursive_target(u, velocity, integral, gaps, steps, torch.full((size,), far), limit)


def test_a_velocity_that_its_own_walk_confirms_is_its_own_target():
    """The fixed point: (t - r) u = step v + I."""
    u, velocity = pair(3)
    integral = 0.4 * u - 0.01 * velocity
    found = target(u, velocity, integral.detach(), 0.4, True)
    torch.testing.assert_close(found, u.detach())
    assert not found.requires_grad
    # What is left over moves it, a hundred times as far, and never by more than the limit.
    torch.testing.assert_close(target(u, velocity, integral.detach() - 1e-3, 0.4, True), u.detach() - 0.1)
    torch.testing.assert_close(target(u, velocity, integral.detach() - 1.0, 0.4, True), u.detach() - 1.0)
    torch.testing.assert_close(target(u, velocity, integral.detach() - 1.0, 0.4, True, None), u.detach() - 100.0)


def test_both_branches_agree_where_the_gap_is_one_step():
    u, velocity = pair(4)
    nothing = torch.zeros_like(u)
    at_step = target(u, velocity, nothing, 0.01, True, None)
    torch.testing.assert_close(at_step, target(u, velocity, nothing, 0.01, False, None))
    torch.testing.assert_close(at_step, velocity)
