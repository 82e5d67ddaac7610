"""Forward derivatives of a network: those that torch gives, in two products for each layer in the place of three.

And in hardly more memory than a pass without one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fewstep.networks.derivative import derivative_along
from fewstep.programs.planning.memory import Footprint


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


class Block(nn.Module):
    """What blocks of networks are made of, in one: norms, activations, a gate, a place added, a skip joined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.join = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.layer_norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x)))
        h = self.join(torch.cat([h, x], 1)).flatten(2).transpose(1, 2)
        value, gate = self.up(self.layer_norm(h) * (1 + self.gate)).chunk(2, -1)
        rms = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = h * rms + self.gate * F.dropout(self.down(value * F.gelu(gate)), 0.1, self.training)
        return h.transpose(1, 2).reshape(x.shape) / 2 + x


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_pass_with_a_derivative_keeps_what_one_without_keeps(trained: bool) -> None:
    """Beside that it needs what a derivative without a graph needs; torch by itself keeps three times as much."""
    torch.manual_seed(0)
    network = nn.Sequential(*(Block() for _ in range(8))).requires_grad_(trained).eval()
    x, change = (torch.randn(2, 8, 16, 16).requires_grad_(not trained) for _ in range(2))

    def peak(run: Callable[[], object]) -> int:
        with Footprint(known=[*network.parameters(), x, change]) as footprint:
            kept = run()
        del kept
        return footprint.peak

    def derive() -> object:
        return derivative_along(network, (x,), (change.detach(),), network)

    plain, whole = peak(lambda: network(x)), peak(derive)
    with torch.no_grad():
        derivative = peak(derive)
    assert whole <= 1.02 * (plain + derivative) and derivative < plain / 4


def test_what_draws_numbers_or_writes_in_place_is_left_to_torch() -> None:
    """Its value and its tangent are of one call: the same entries are dropped, and nothing is written twice."""
    x, weight = torch.ones(4, 64, dtype=torch.float64), torch.ones(64, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        h = F.dropout(x * weight, 0.5, True)
        h.mul_(3.0)
        h *= 2.0
        return F.relu(h, inplace=True) + F.silu(x + 0, True)

    value, derivative = derivative_along(function, (x,), (x,), nn.Identity())
    s = torch.sigmoid(x)
    torch.testing.assert_close(derivative - s * (2 - s), value.detach() - s)
    assert len(value.unique()) == 2
