"""Attention inside a derivative: every way to call it ends in one that has a tangent, and nothing stays changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fewstep.errors import UserError
from fewstep.kernels import dispatch
from fewstep.networks.derivable import described
from fewstep.networks.derivative import derivative_along, refuse_underivable

KEPT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


class Net(nn.Module):
    """Attention of one kind between two layers, over tokens (B, 6, 16) in two heads."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.attend = nn.Linear(16, 48), nn.Linear(16, 16), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)) for part in self.before(x).chunk(3, -1))
        return self.after(self.attend(q, k, v).flatten(-2))


def torchs(**how: Any) -> Callable[..., Tensor]:
    def attend(*tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tokens), **how).transpose(1, 2)

    return attend


def dispatched(backend: str | None, mask: Any = None) -> Callable[..., Tensor]:
    def attend(*tokens: Tensor) -> Tensor:
        return dispatch_attention_fn(*tokens, attn_mask=mask, backend=backend)

    return attend


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def changes(network: nn.Module, expected: nn.Module | None = None) -> tuple[Tensor, Tensor, str]:
    """A network's answer along a direction, how it changes, and by what; weights of another, if one is given."""
    if expected is not None:
        network.load_state_dict(expected.state_dict())
    x, direction = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    with dispatch.counted() as ran:
        value, change = derivative_along(network, (x,), (direction,), network)
    return value.detach(), change, described(ran)


ONCE = "dual attention (closed form) in 1 place"


@pytest.mark.parametrize(
    "backend", ["native", "flex", "_native_flash", "_native_math", "xformers", "sage", "flash", None]
)
def test_every_backend_of_diffusers_has_a_derivative(backend: str | None) -> None:
    expected = Net(formula)
    value, change, path = changes(Net(dispatched(backend)), expected)
    torch.testing.assert_close((value, change), changes(expected)[:2])
    assert path == ONCE


def test_a_padding_mask_is_one_of_keys_as_in_the_backends() -> None:
    expected = Net(lambda *x: formula(*x, mask=KEPT[:, None, None]))
    for attend in (
        dispatched("_native_flash", KEPT),
        dispatched("native", KEPT),
        torchs(attn_mask=KEPT[:, None, None]),
    ):
        value, change, path = changes(Net(attend), expected)
        torch.testing.assert_close((value, change), changes(expected)[:2])
        assert path == ONCE


@pytest.mark.parametrize("heads", [None, 2])
def test_a_mask_of_blocks(heads: int | None) -> None:
    def later(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query + (0 if heads is None else head) >= key

    mask = create_block_mask(later, None, heads, 6, 6, device="cpu", BLOCK_SIZE=4)
    ours = Net(dispatched("flex", mask))
    value, change, path = changes(ours)
    x = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(1))[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that flex is not compiled
        torch.testing.assert_close(value, ours(x).detach())
    seen = torch.arange(6)[:, None] + torch.arange(2 if heads else 1)[:, None, None] >= torch.arange(6)
    expected = Net(lambda *x: formula(*x, mask=seen))
    expected.load_state_dict(ours.state_dict())
    torch.testing.assert_close(change, changes(expected)[1])
    assert path == ONCE


def test_blocks_without_a_rule() -> None:
    """The kernel looks at the blocks; torch's formula for a CPU does not."""
    count, which = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count, which, BLOCK_SIZE=4)
    seen = torch.tensor([[False, True], [True, True]]).repeat_interleave(4, 0).repeat_interleave(4, 1)[:6, :6]
    expected = Net(lambda *x: formula(*x, mask=seen))
    torch.testing.assert_close(changes(Net(dispatched("flex", mask)), expected)[:2], changes(expected)[:2])


@pytest.mark.parametrize("default", ["flex", "_native_flash"])
def test_the_default_of_the_process_and_its_backends_stay(default: str) -> None:
    registry = _AttentionBackendRegistry
    before = dict(registry._backends)
    expected = Net(formula)
    with attention_backend(default):
        active = registry.get_active_backend()
        found = changes(Net(dispatched(None)), expected)
        assert registry.get_active_backend() == active and registry._backends == before
    torch.testing.assert_close(found[:2], changes(expected)[:2])

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        changes(Broken())
    assert registry._backends == before


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("graph", [True, False])
def test_multihead_attention_has_a_derivative(weights: bool, graph: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.heads(x, x, x, need_weights=weights)[0]

    class Same(Own):
        def forward(self, x: Tensor) -> Tensor:
            own = self.heads
            parts = F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
            return own.out_proj(formula(*(part.unflatten(-1, (2, 8)) for part in parts)).flatten(-2))

    expected = Same().eval()
    with torch.set_grad_enabled(graph):
        found = changes(Own().eval(), expected)
    torch.testing.assert_close(found[:2], changes(expected)[:2])
    assert found[2] == "torch's plain formula in 1 of nn.MultiheadAttention"


def test_processors_of_xformers_and_of_plain_formulas() -> None:
    """The first are put back as they were; the second need no help."""
    torch.manual_seed(0)
    plain = Attention(16, heads=2, dim_head=8, processor=AttnProcessor())
    network = Attention(16, heads=2, dim_head=8, processor=XFormersAttnProcessor())
    processor = network.processor
    found, expected = changes(network, plain), changes(plain)
    torch.testing.assert_close(found[:2], expected[:2])
    assert network.processor is processor
    assert found[2] == ONCE and expected[2] == "the network's own formulas"


def test_attention_without_a_tangent_runs_as_ever() -> None:
    context = torch.randn(2, 2, 6, 8)

    class Beside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * F.scaled_dot_product_attention(context, context, context).mean()

    _, change, path = changes(Beside())
    assert bool(change.any()) and path == "the network's own formulas"


def test_what_cannot_be_derived_says_so_in_one_line() -> None:
    with pytest.raises(UserError, match="dropout has to be 0") as refused:
        changes(Net(torchs(dropout_p=0.5)))
    assert "\n" not in str(refused.value)

    def itself(*tokens: Tensor) -> Tensor:
        return flex_attention(*(x.transpose(1, 2) for x in tokens)).transpose(1, 2)

    with pytest.raises(UserError, match="Net has no forward derivative") as refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changes(Net(itself))
    assert "\n" not in str(refused.value)


def test_compiled_networks_are_derived_as_they_were_written() -> None:
    torch.compiler.reset()
    expected = Net(formula)
    network = Net(torchs())
    network.compile(backend="eager")
    network(torch.randn(2, 6, 16))
    value, change, path = changes(network, expected)
    torch.testing.assert_close((value, change), changes(expected)[:2])
    assert path == ONCE


def test_a_gradient_flows_through_the_answer() -> None:
    expected, network = Net(formula), Net(torchs())
    network.load_state_dict(expected.state_dict())
    x, direction = torch.randn(2, 2, 6, 16)
    with dispatch.forced("closed"):
        value, _ = derivative_along(network, (x,), (direction,), network)
    found, wanted = (
        torch.autograd.grad(y.square().sum(), n.before.weight) for y, n in ((value, network), (expected(x), expected))
    )
    torch.testing.assert_close(found, wanted)


def test_what_derives_attention_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Timed(Net):
        def forward(self, t: Tensor) -> Tensor:
            return super().forward(t.float()[:, None, None].expand(-1, 6, 16).sin())

    network = Timed(torchs())
    with caplog.at_level("INFO", "fewstep"):
        refuse_underivable(network, torch.tensor([0.3, 0.6], dtype=torch.float64), network)
    assert f"Timed: attention in a derivative is {ONCE}" in caplog.text
