"""Attention that can be differentiated forward, inside a derivative, whatever the processors of a network call.

Fused kernels have no forward derivative, and which of them runs is told in many places: to torch, to diffusers'
dispatcher, to each processor, to nn.MultiheadAttention. So what all of them come to is replaced for the length of a
pass: torch's own attention, and the dispatcher's backends. The network, others, and defaults stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fewstep.kernels import dispatch
from fewstep.kernels.dual_attention import OPERATION, attention, dual_attention

#: Processors of diffusers that call xformers themselves -> those of the same formula that call torch.
_XFORMERS = {
    processors.XFormersAttnProcessor: processors.AttnProcessor2_0,
    processors.XFormersAttnAddedKVProcessor: processors.AttnAddedKVProcessor2_0,
    processors.XFormersJointAttnProcessor: processors.JointAttnProcessor2_0,
}
#: What is counted for nn.MultiheadAttention, beside the forms of dual attention.
MULTIHEAD = "multi_head_attention"


@contextmanager
def derivable(network: nn.Module) -> Iterator[None]:
    """Inside a dual level, attention takes its tangent along, and group norms can be differentiated.

    Args:
        network: that is called there.
    """
    backends = _AttentionBackendRegistry._backends
    before = dict(backends)
    own = [(module, module.processor) for module in network.modules() if type(_processor(module)) in _XFORMERS]
    backends.update({name: partial(_dispatched, name) for name in before})
    for module, processor in own:
        module.processor = _XFORMERS[type(processor)]()
    try:
        with _Derivable():
            yield
    finally:
        backends.update(before)
        for module, processor in own:
            module.processor = processor


def described(ran: Counter[tuple[str, str]]) -> str:
    """What took the derivative of attention, in words, of what :func:`fewstep.kernels.dispatch.counted` counted."""
    called = {form: count for (name, form), count in ran.items() if name == OPERATION}
    parts = [f"dual attention ({form} form) in {n} place{'s' * (n > 1)}" for form, n in called.items()]
    if heads := ran[MULTIHEAD, "math"]:
        parts.append(f"torch's plain formula in {heads} of nn.MultiheadAttention")
    return ", ".join(parts) or "the network's own formulas"


class _Derivable(TorchFunctionMode):
    """Inside, torch's attention and group norm are such as have a forward derivative."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        if func is F.group_norm:
            return func(_in_order(args[0]), *args[1:], **kwargs)
        if func is F.multi_head_attention_forward:  # that a mode is on keeps it from its fast path
            dispatch.count(MULTIHEAD, "math")
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's attention (..., Nq, Dv), with its tangent where it has one."""
    how = attn_mask, dropout_p, is_causal, scale, enable_gqa
    duals = [forward_ad.unpack_dual(x) for x in (query, key, value)]
    if dispatch.has_tangent(attn_mask):
        return attention(query, key, value, *how)
    dq, dk, dv = (None if dual.tangent is None else dual.tangent.detach() for dual in duals)
    if dq is dk is dv is None:
        return F.scaled_dot_product_attention(query, key, value, *how[:3], scale=scale, enable_gqa=enable_gqa)
    q, k, v = (dual.primal for dual in duals)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        # A fused backward pass is worth a second answer.
        o = F.scaled_dot_product_attention(q, k, v, *how[:3], scale=scale, enable_gqa=enable_gqa)
        with torch.no_grad():
            change = dual_attention(q, k, v, dq, dk, dv, *how).do
    else:
        o, _, change, _ = dual_attention(q, k, v, dq, dk, dv, *how)
    assert change is not None
    return forward_ad.make_dual(o, change)


def _dispatched(
    backend: AttentionBackendName,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
    **_: Any,
) -> Tensor:
    """What stands for a backend of diffusers' dispatcher, of (B, N, heads, D)."""
    if return_lse or _parallel_config is not None:
        raise NotImplementedError(f"attention over several devices, in the backend {backend.value}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        attn_mask = _dense(attn_mask, q, k)
    elif attn_mask is not None and attn_mask.dim() == 2:
        # Of keys; flex alone reads it as one of queries.
        flex = backend is AttentionBackendName.FLEX
        attn_mask = attn_mask[:, None, :, None] if flex else attn_mask[:, None, None, :]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return o.transpose(1, 2)


def _dense(mask: Any, q: Tensor, k: Tensor) -> Tensor:
    """A flex_attention.BlockMask, entry by entry (B or 1, heads or 1, Nq, Nk): true where blocks and rule both are."""
    from torch.nn.attention.flex_attention import create_mask

    rows, columns = q.shape[-2], k.shape[-2]
    blocks = mask.to_dense().bool()
    for dim, size in zip((-2, -1), mask.BLOCK_SIZE, strict=True):
        blocks = blocks.repeat_interleave(size, dim)
    batch, heads = blocks.shape[:2]
    return create_mask(mask.mask_mod, batch, heads, rows, columns, device=q.device) & blocks[..., :rows, :columns]


def _in_order(x: Tensor) -> Tensor:
    """The same, laid out in order: torch cannot differentiate the group norm of what was transposed."""
    dual = forward_ad.unpack_dual(x)
    if dual.tangent is None or (dual.primal.is_contiguous() and dual.tangent.is_contiguous()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _processor(module: nn.Module) -> Any:
    return getattr(module, "processor", None)
