"""Forward derivatives of a network: those that torch gives, in two products for each layer in the place of three."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fewstep.networks.derivative import derivative_along


class Layers(nn.Module):
    """Every kind of layer, with and without a bias, called by place and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.outer = nn.Linear(4, 3, bias=False)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.inner(x))).flatten(2).transpose(1, 2)
        return F.linear(torch.sin(self.outer(h)), self.last.weight, bias=self.last.bias) * x.mean()


@pytest.fixture
def network() -> Layers:
    torch.manual_seed(0)
    return Layers().double()


def test_value_gradient_and_derivative_are_torchs_own(network: Layers) -> None:
    x, change = (torch.randn(3, 2, 6, 6, dtype=torch.float64) for _ in range(2))
    with forward_ad.dual_level():
        expected, tangent = forward_ad.unpack_dual(network(forward_ad.make_dual(x, change)))
    gradients = torch.autograd.grad(expected.square().sum(), network.parameters())
    value, derivative = derivative_along(network, (x,), (change,), network)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(derivative, tangent)
    assert not derivative.requires_grad
    torch.testing.assert_close(torch.autograd.grad(value.square().sum(), network.parameters()), gradients)


def test_a_layer_takes_two_products(network: Layers) -> None:
    """Without the bound torch multiplies with a weight's tangent of zeros, too."""
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    counts = []
    for run in (lambda: network(x), lambda: derivative_along(network, (x,), (x,), network)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0]


def test_a_weight_that_changes_is_heeded(network: Layers) -> None:
    """A layer whose weight is a function of the point has the derivative of both."""
    w, x = network.last.weight.detach(), torch.randn(2, 3, dtype=torch.float64)

    def function(scale: Tensor) -> Tensor:
        return F.linear(scale[:, None] * x, scale[0] * w, None)

    scale = torch.ones(2, dtype=torch.float64)
    _, derivative = derivative_along(function, (scale,), (scale,), network)
    torch.testing.assert_close(derivative, 2 * F.linear(x, w))
