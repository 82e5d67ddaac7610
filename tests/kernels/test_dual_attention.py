"""Attention and its tangent in their forms: values, gradients, masks, memory, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import assert_form, assert_near, changed, doubled, every_dtype
from torch import Tensor
from torch.autograd import forward_ad, gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.kernels import attention_pieces, dispatch, dual_attention
from fewstep.kernels.dual_attention import attention

PRIMALS = ("query", "key", "value")
SDPA = F.scaled_dot_product_attention


def inputs_of(
    dtype: torch.dtype, device: str, lead: tuple[int, ...] = (2, 3), queries: int = 5, keys: int = 7, width: int = 8,
    value_width: int | None = None, heads_of_keys: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the operation, of lengths and widths of every kind."""
    generator = torch.Generator().manual_seed(queries * keys + width)
    lead_of_keys = lead if heads_of_keys is None else (*lead[:-1], heads_of_keys)
    shapes = {"query": (*lead, queries, width), "key": (*lead_of_keys, keys, width)}
    shapes["value"] = (*lead_of_keys, keys, value_width or width)
    made = {}
    for name, shape in shapes.items():
        made[name] = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        made[f"{name}_change"] = torch.randn(shape, generator=generator).to(device, dtype)
    return made


def masks(queries: int = 5, keys: int = 7) -> dict[str, Tensor]:
    """Of every shape and kind; one query looks at nothing."""
    seen = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[0, 0, 1] = False
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    padding[1, ..., keys // 2 :] = False
    added = torch.zeros(3, queries, keys).normal_(generator=torch.Generator().manual_seed(2))
    return {
        "seen": seen,
        "padding": padding,
        "a matrix": seen[1, 0],
        "added": added,
        "added to a row": torch.zeros(2, 3, queries, keys).masked_fill(~seen, -math.inf),
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "cross": {},
    "odd widths": {"width": 20, "value_width": 33},
    "tiles": {"lead": (2,), "queries": 70, "keys": 65, "width": 16},
    "no heads": {"lead": (), "queries": 3, "keys": 1},
    "three": {"lead": (2, 1, 2), "queries": 1, "keys": 9, "width": 17},
}


# --- values, tangents, log-sum-exp, gradients ------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_length_and_width(form: str, layout: str, dtype: torch.dtype, device: str) -> None:
    assert_form(dual_attention, form, inputs_of(dtype, device, **LAYOUTS[layout]))


@pytest.mark.parametrize(
    "width", [64, pytest.param(128, marks=pytest.mark.soak), pytest.param(256, marks=pytest.mark.soak)]
)
def test_wide_heads(form: str, width: int, device: str) -> None:
    assert_form(dual_attention, form, inputs_of(torch.float32, device, (1, 2), 9, 33, width))


@pytest.mark.parametrize("mask", masks())
def test_masks(form: str, mask: str, device: str) -> None:
    told = masks()[mask].to(device)
    assert_form(dual_attention, form, inputs_of(torch.float32, device) | {"attn_mask": told})


def test_a_causal_order_and_a_scale(form: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device, (2,), 70, 65) | {"is_causal": True, "scale": 0.7}
    assert_form(dual_attention, form, inputs)


def test_heads_that_share_keys(form: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device, lead=(2, 6), heads_of_keys=2)
    assert_form(dual_attention, form, inputs | {"enable_gqa": True, "attn_mask": masks()["seen"].to(device)})


@pytest.mark.parametrize("moves", ["query", "key", "value", "query value", "key value"])
def test_what_does_not_change_needs_no_tangent(form: str, moves: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device)
    still = {name: torch.zeros_like(x) for name, x in inputs.items() if name.endswith("change")}
    asked = {f"{name}_change": inputs[f"{name}_change"] for name in moves.split()}
    primals = {name: inputs[name].detach() for name in PRIMALS}
    with dispatch.forced(form):
        ours, whole = (dual_attention.dual_attention(**primals, **x) for x in (asked, still | asked))
    for one, other in zip(ours, whole, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("name", masks())
def test_the_definition_is_torchs(name: str) -> None:
    """Values, gradients and tangents of its plain formula, rows that look at nothing among them."""
    inputs = inputs_of(torch.float64, "cpu")
    primals, changes = ([inputs[f"{x}{end}"] for x in PRIMALS] for end in ("", "_change"))
    weights = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    mask = doubled(masks()[name])
    with sdpa_kernel(SDPBackend.MATH):
        expected = SDPA(*primals, attn_mask=mask)
        gradients = torch.autograd.grad(expected, primals, weights)
        _, tangent = torch.func.jvp(lambda *x: SDPA(*x, attn_mask=mask), tuple(primals), tuple(changes))
    said = dual_attention.reference(*primals, *changes, attn_mask=mask)
    torch.testing.assert_close(said.o, expected)
    torch.testing.assert_close(said.do, tangent.detach())
    torch.testing.assert_close(torch.autograd.grad(said.o, primals, weights), gradients)


def test_a_row_that_sees_nothing_is_zero_and_its_sum_too(form: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device) | {"attn_mask": torch.zeros(5, 7, dtype=torch.bool, device=device)}
    with dispatch.forced(form):
        said = dual_attention.dual_attention(**inputs)
    assert all(float(x.abs().sum()) == 0 for x in (said.o, said.do, said.dlse))
    assert bool((said.lse == -math.inf).all())
    gradients = torch.autograd.grad(said.o.sum(), [inputs[name] for name in PRIMALS])
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients)


# --- torch's own ways to ask for a derivative -------------------------------------------------------------------------


def function(mask: Tensor | None = None, causal: bool = False) -> Any:
    """The closed form, of float64 too."""

    def closed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        said = dual_attention.closed(query, key, value, attn_mask=mask, is_causal=causal)
        return said.o, said.lse

    return closed


@pytest.mark.parametrize("piece", [attention_pieces.PIECE_BYTES["cpu"], 250])
@pytest.mark.parametrize("kind", ["plain", "causal", "added", "reference"])
def test_gradcheck(monkeypatch: pytest.MonkeyPatch, kind: str, piece: int) -> None:
    monkeypatch.setitem(attention_pieces.PIECE_BYTES, "cpu", piece)
    inputs = inputs_of(torch.float64, "cpu", (1, 2), 3, 4, 2)
    primals = [inputs[name] for name in PRIMALS]
    mask = torch.randn(1, 3, 4).requires_grad_() if kind == "added" else None
    mask = None if mask is None else mask.detach().double()
    checked = dual_attention.reference if kind == "reference" else function(mask, kind == "causal")
    assert gradcheck(lambda *x: checked(*x)[:2], primals, check_forward_ad=True)


def test_tangents_and_maps_of_torch(form: str, device: str) -> None:
    """torch.func.jvp, a dual level, forward and backward Jacobians, and a map over samples."""
    inputs = inputs_of(torch.float32, device, (2,))
    primals, changes = ([inputs[f"{x}{end}"].detach() for x in PRIMALS] for end in ("", "_change"))
    mask = masks()["seen"][:, 0].to(device)
    expected = dual_attention.reference(*(x.double() for x in primals + changes), attn_mask=mask)

    def attend(*x: Tensor) -> Tensor:
        return attention(*x, attn_mask=mask)

    with dispatch.forced(form), dispatch.counted() as ran:
        o, tangent = torch.func.jvp(attend, tuple(primals), tuple(changes))
        assert_near(o, expected.o)
        assert_near(tangent, expected.do)
        with forward_ad.dual_level():
            told = forward_ad.unpack_dual(attend(*map(forward_ad.make_dual, primals, changes)))
        assert_near(told.tangent, expected.do)

        def one_row(query: Tensor) -> Tensor:
            return attention(query, *(x[:1] for x in primals[1:]), attn_mask=mask[:1, :1])

        jacobians = [way(one_row)(primals[0][:1, :1]) for way in (torch.func.jacfwd, torch.func.jacrev)]
        torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-5)
        mapped = torch.func.vmap(lambda q, k, m: attention(q, k, primals[2][0], attn_mask=m), in_dims=(0, 0, 0))
        shared = torch.stack([primals[2][0]] * 2)
        assert_near(mapped(*primals[:2], mask), attend(*primals[:2], shared).double())
    assert set(ran) == {("dual_attention", form)}


@pytest.mark.parametrize("outer", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]])
@pytest.mark.parametrize("inner", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]])
def test_a_second_derivative_is_refused_and_never_zero(form: str, inner: Any, outer: Any, device: str) -> None:
    q = torch.randn(4, 8, device=device)

    def once(x: Tensor) -> Tensor:
        return inner(lambda x: attention(x, q, q).square().sum())(x).square().sum()

    with dispatch.forced(form), pytest.raises(NotImplementedError, match="first order alone"):
        outer(once)(q)
    with dispatch.forced("reference"):
        assert float(outer(once)(q).abs().sum()) > 0


def test_gradients_of_gradients_are_refused(form: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device)
    with dispatch.forced(form):
        said = attention(*(inputs[name] for name in PRIMALS))
        (gradient,) = torch.autograd.grad(said.square().sum(), inputs["query"], create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match=r"first order alone|does not require grad"):
            torch.autograd.grad(gradient.sum(), inputs["query"])


def test_a_mask_that_is_learned_or_changes_takes_the_plain_formula() -> None:
    primals = [inputs_of(torch.float32, "cpu")[name].detach() for name in PRIMALS]
    mask = masks()["added"]

    def attend(mask: Tensor) -> Tensor:
        return attention(*primals, attn_mask=mask)

    with dispatch.counted() as ran:
        (gradient,) = torch.autograd.grad(attend(mask.requires_grad_()).square().sum(), mask)
        tangent = torch.func.jvp(attend, (mask.detach(),), (gradient,))[1]
    assert ran == {("dual_attention", "reference"): 2}
    step = 1e-3 * gradient
    near = (attend(mask.detach() + step) - attend(mask.detach() - step)) / 2e-3
    torch.testing.assert_close(tangent, near, rtol=1e-2, atol=1e-4)
    expected = torch.autograd.grad(SDPA(*primals, attn_mask=mask).square().sum(), mask)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_compiler_is_given_the_plain_formula() -> None:
    """It would derive the forward pass of an autograd.Function, and not ask for its jvp."""
    primals = tuple(inputs_of(torch.float32, "cpu")[name].detach() for name in PRIMALS)

    def tangent(*x: Tensor) -> Tensor:
        return torch.func.jvp(attention, x, primals)[1]

    torch.compiler.reset()
    compiled = torch.compile(tangent, backend="eager", fullgraph=True)
    with dispatch.counted() as ran:
        found = compiled(*primals)
    torch.testing.assert_close(found, tangent(*primals), rtol=1e-5, atol=1e-6)
    assert not ran


# --- dtypes, what is refused, memory ----------------------------------------------------------------------------------


def test_autocast_says_the_dtype(form: str, device: str) -> None:
    inputs = inputs_of(torch.float32, device)
    with dispatch.forced(form), torch.autocast(device, torch.bfloat16):
        said = dual_attention.dual_attention(**inputs)
        gradients = torch.autograd.grad(said.o.float().sum(), [inputs[name] for name in PRIMALS])
    assert said.o.dtype == said.do.dtype == torch.bfloat16
    assert {said.lse.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
    half = changed(inputs, lambda x: x.bfloat16().double())
    assert_near(said.o, dual_attention.reference(**half).o)


def test_dropout_and_two_masks_are_refused() -> None:
    q = torch.zeros(2, 4)
    with pytest.raises(NotImplementedError, match="dropout"):
        attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="not both"):
        attention(q, q, q, attn_mask=torch.ones(2, 2, dtype=torch.bool), is_causal=True)


@pytest.mark.parametrize("limit", [64, 200, 300, 1000, 10**4])
@pytest.mark.parametrize("mask", [None, *masks()])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, mask: str | None, limit: int) -> None:
    inputs = inputs_of(torch.float32, "cpu") | {"attn_mask": None if mask is None else masks()[mask]}
    monkeypatch.setitem(attention_pieces.PIECE_BYTES, "cpu", limit)
    pieces = attention_pieces.pieces_of(inputs["query"], inputs["key"])
    assert len(pieces) == {64: 30, 200: 12, 300: 6, 1000: 2, 10**4: 1}[limit]  # a row is of 56 bytes, a head of 280
    seen = torch.zeros(2, 3, 5)
    for piece in pieces:
        seen[piece] += 1
    assert bool((seen == 1).all())
    assert_form(dual_attention, "closed", inputs)


class Largest(TorchDispatchMode):
    """The most bytes of tensors that one operation made."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        made = output if isinstance(output, (tuple, list)) else (output,)
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in made if isinstance(x, Tensor))])
        return output


def bytes_of(n: int) -> tuple[int, int]:
    """The most that an operation makes at once, and what is kept for the backward pass, of n queries and keys."""
    inputs = inputs_of(torch.float32, "cpu", (1,), n, n, 8)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.nbytes)
        return x

    with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        dual_attention.dual_attention(**inputs).o.sum().backward()
    return mode.bytes, sum(kept)


def test_memory_grows_with_the_length_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, tangent and backward: nothing is larger than a piece or a few queries, and no scores are kept."""
    monkeypatch.setitem(attention_pieces.PIECE_BYTES, "cpu", 2**15)
    (small, kept_of_small), (large, kept_of_large) = bytes_of(128), bytes_of(512)
    assert small == 2**14  # one of two matrices of scores
    assert large == 512 * 8 * 4 * 2  # [q, dq]; all scores would be of 1 MiB
    assert kept_of_large == 4 * kept_of_small == 512 * (3 * 8 + 1) * 4  # q, k, v and the log-sum-exp: no tangents
