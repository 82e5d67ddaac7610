"""Softmax attention and how it changes along a direction: output, tangent and log-sum-exp in one pass.

    s  = scale q k^T + mask             p = softmax(s)        o = p v          lse = log sum exp s
    ds = scale (dq k^T + q dk^T)        dlse = sum p ds       do = (p ds) v + p dv - dlse o

torch's fused attention has no forward derivative, and its plain formula keeps several matrices of scores. Rows that a
mask leaves nothing to look at are zero, as torch has them. Nothing of the size of the scores is kept for the backward
pass, which is of first order: what would need a second one raises.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fewstep.kernels import dispatch
from fewstep.kernels.attention_pieces import Attended, Inputs, Options, attend, attend_backward, working

OPERATION = "dual_attention"
_FIRST_ORDER = "derivatives of first order alone; FEWSTEP_KERNELS=dual_attention=reference has others"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` (..., Nq, Dv), which can be differentiated forward, too.

    Args:
        query: (..., Nq, D).
        key: (..., Nk, D).
        value: (..., Nk, Dv).
        attn_mask: broadcasts to (..., Nq, Nk): true where a query looks at a key, or what is added to the scores.
        dropout_p: 0.
        is_causal: query i looks at keys 0 to i.
        scale: of the scores; None: 1 / sqrt(D).
        enable_gqa: several heads of queries may share one of keys and values.

    Raises:
        NotImplementedError: ``dropout_p`` is not 0, or a second derivative is wanted.
        ValueError: a mask beside ``is_causal``.
    """
    return _attend(*_read((query, key, value), (None,) * 3, attn_mask, dropout_p, is_causal, scale, enable_gqa)).o


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_change: Tensor | None = None,
    key_change: Tensor | None = None,
    value_change: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """Attention and its tangent in one pass; gradients reach query, key and value, and come from ``o`` and ``lse``.

    Args:
        query: (..., Nq, D); as the others in :func:`attention`.
        key: (..., Nk, D).
        value: (..., Nk, Dv).
        query_change: how it changes, of the same shape; None where it does not.
        key_change: see ``query_change``.
        value_change: see ``query_change``.
        attn_mask: does not change.
        dropout_p: 0.
        is_causal: see :func:`attention`.
        scale: see :func:`attention`.
        enable_gqa: see :func:`attention`.

    Raises:
        NotImplementedError: ``dropout_p`` is not 0.
        ValueError: a mask beside ``is_causal``.
    """
    changes = query_change, key_change, value_change
    return _held(_attend(*_read((query, key, value), changes, attn_mask, dropout_p, is_causal, scale, enable_gqa)))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_change: Tensor | None = None,
    key_change: Tensor | None = None,
    value_change: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """The definition; arguments as in :func:`dual_attention`."""
    changes = query_change, key_change, value_change
    return _held(_reference(*_read((query, key, value), changes, attn_mask, dropout_p, is_causal, scale, enable_gqa)))


def closed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_change: Tensor | None = None,
    key_change: Tensor | None = None,
    value_change: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """Four products of matrices and three passes over the scores, which nobody keeps; see :func:`dual_attention`."""
    changes = query_change, key_change, value_change
    inputs, options = _read((query, key, value), changes, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _held(Attended(*_Attention.apply(*inputs, options, "closed")))


def example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Any]:
    """Arguments of :func:`dual_attention` for queries of a shape (..., N, D), with as many keys."""
    generator = torch.Generator().manual_seed(seed)
    names = ("query", "key", "value", "query_change", "key_change", "value_change")
    made = {name: torch.randn(shape, generator=generator).to(device, dtype) for name in names}
    return {name: x if name.endswith("change") else x.requires_grad_() for name, x in made.items()}


def _held(said: Attended) -> Attended:
    return Attended(said.o, said.lse, *(None if x is None else x.detach() for x in (said.do, said.dlse)))


def _attend(inputs: Inputs, options: Options) -> Attended:
    form = _form(inputs)
    if form == "reference" or torch.compiler.is_compiling():
        # Plain operations: torch derives them in every order, and a compiler, which drops a Function's jvp, fuses them.
        return _reference(inputs, options)
    return Attended(*_Attention.apply(*inputs, options, form))


def _reference(inputs: Inputs, options: Options) -> Attended:
    q, k, v, dq, dk, dv, mask = (None if x is None else working(x) for x in inputs)
    assert q is not None and k is not None and v is not None
    s = options.scale * (q @ k.mT)
    if options.causal:
        mask = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    nothing = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(nothing, 0.0)
    p = s.softmax(-1).masked_fill(nothing, 0.0)
    o, lse = p @ v, s.logsumexp(-1).masked_fill(nothing.squeeze(-1), -math.inf)
    dtype = inputs.q.dtype
    if not inputs.change:
        return Attended(o.to(dtype), lse)
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    ds = options.scale * (dq @ k.mT + q @ dk.mT)
    dlse = (p * ds).sum(-1)
    do = (p * ds) @ v + p @ dv - dlse[..., None] * o
    return Attended(o.to(dtype), lse, do.to(dtype), dlse)


class _Attention(torch.autograd.Function):
    """o, lse, do and dlse of :class:`Inputs`, which are differentiated once, either way."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        inputs, options, form = Inputs(*args[:7]), args[7], args[8]
        with torch.autocast(inputs.q.device.type, enabled=False):
            if form == "triton":
                from fewstep.kernels.fused import dual_attention as fused

                return fused.attend(inputs, options)
            return attend(inputs, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        q, k, v, *changes, mask, ctx.options, ctx.form = inputs
        ctx.told = any(change is not None for change in changes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, output[1])
        ctx.save_for_forward(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, of_o: Tensor | None, of_lse: Tensor | None, *of_change: Tensor | None) -> tuple[Any, ...]:
        if any(gradient is not None for gradient in of_change):
            raise NotImplementedError(f"{OPERATION}: {_FIRST_ORDER}")
        q, k, v, mask, lse = ctx.saved_tensors
        of_o = lse.new_zeros(*lse.shape, v.shape[-1]) if of_o is None else of_o
        return *_Gradient.apply(q, k, v, mask, lse, of_o, of_lse, ctx.options), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Tensor | None, ...]:
        if ctx.told:
            raise NotImplementedError(f"{OPERATION}: {_FIRST_ORDER}")
        q, k, v, mask = ctx.saved_tensors
        _, _, do, dlse = _Attention.apply(q, k, v, *changes[:3], mask, ctx.options, ctx.form)
        return do, dlse, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        output = _Attention.apply(*_in_front(info, in_dims, args))
        return output, tuple(None if x is None else 0 for x in output)


class _Gradient(torch.autograd.Function):
    """The backward pass: a Function without derivatives, so that asking for one raises.

    ``once_differentiable`` would do so outside of torch.func, and return zeros inside.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        q, k, v, mask, lse, of_o, of_lse, options = args
        with torch.autocast(lse.device.type, enabled=False):
            return attend_backward(Inputs(q, k, v, None, None, None, mask), options, lse, of_o, of_lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{OPERATION}: {_FIRST_ORDER}")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{OPERATION}: {_FIRST_ORDER}")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _Gradient.apply(*_in_front(info, in_dims, args)), (0, 0, 0)


def _in_front(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """A mapped dimension is one more leading one, of all tensors."""

    def in_front(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    # A tuple of options has a tuple of dimensions.
    return [in_front(x, dim if isinstance(dim, int) else None) for x, dim in zip(args, in_dims, strict=True)]


def _form(inputs: Inputs) -> str:
    """The form that runs; a mask that is learned, or changes, needs the plain formula."""
    mask = inputs.mask
    if mask is not None and (mask.requires_grad or dispatch.has_tangent(mask)):
        with dispatch.forced("reference"):
            return dispatch.choose(OPERATION, inputs.q)
    return dispatch.choose(OPERATION, inputs.q, inputs.k, inputs.v)


def _read(
    primals: tuple[Tensor, Tensor, Tensor],
    changes: tuple[Tensor | None, ...],
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> tuple[Inputs, Options]:
    """Of one dtype and the same leading dimensions, with as many heads of keys as of queries."""
    if dropout:
        raise NotImplementedError("attention with dropout has no forward derivative; its dropout has to be 0")
    if mask is not None and causal:
        raise ValueError("attention takes a mask or is_causal, not both")
    query = primals[0]
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype

    def like(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if grouped and x.shape[-3] != query.shape[-3]:
            x = x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)
        return x

    q, k, v = (like(x) for x in primals)
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in (q, k, v))
    dq, dk, dv = (None if x is None else like(x).expand(*lead, *x.shape[-2:]) for x in changes)
    if mask is not None:
        mask = mask[(None,) * (len(lead) + 2 - mask.dim())]
    options = Options(causal, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return Inputs(q, k, v, dq, dk, dv, mask), options
