"""Tangents that are held fixed: what a pass keeps for its backward pass is then what it keeps without them.

Left to itself, torch keeps with every value its tangent, and the graph of that, until the dual level ends: 2.2 times
the bytes of a plain pass in a transformer, 3.5 times in a small UNet. And for want of a tangent of a layer's weight it
makes one of zeros, and multiplies the input with it: a third product (seen in torch 2.14.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Their arguments are the input, the weight, the bias, and what has no derivative.
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def _functions(names: str) -> set[Any]:
    return {getattr(home, name) for name in names.split() for home in (torch, Tensor, F) if hasattr(home, name)}


#: What else keeps tensors for a backward pass, and what makes tensors that others keep, by all their names. None draws
#: random numbers. A view keeps what it is a view of: views are left to torch.
_KEEPING = _functions(
    "add __add__ __radd__ sub subtract __sub__ __rsub__ rsub cat concat stack where pad avg_pool2d "
    "mul multiply __mul__ __rmul__ div divide true_divide __truediv__ __rtruediv__ addcmul addcdiv lerp "
    "pow __pow__ __rpow__ square sqrt rsqrt reciprocal exp log sin cos tanh sigmoid softmax log_softmax norm var std "
    "silu gelu relu leaky_relu elu softplus mish glu logsigmoid hardswish "
    "group_norm layer_norm rms_norm normalize matmul __matmul__ mm bmm addmm baddbmm einsum"
)
#: Those that do with a tangent what they do with its value, their first argument.
_LINEAR = _functions("neg __neg__ mean sum clone contiguous reshape flatten interpolate to float type type_as")


class HeldTangents(TorchFunctionMode):
    """Inside, values have a graph and keep no tangents, tangents have none, and layers take two products.

    Other operations than those named here are right, too, and keep more. The derivative that comes out is held fixed.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _LAYERS and len(args) >= 2:
            return _layer(function, args, kwargs)
        if torch.is_grad_enabled() and (function in _KEEPING or function in _LINEAR):
            in_place = any(one is True for one in (*args[1:], kwargs.get("inplace")))  # or keepdim, which loses nothing
            if not in_place:
                return _apart(function, args, kwargs)
        return function(*args, **kwargs)


def _layer(function: Any, args: Any, kwargs: Any) -> Any:
    """The input and its tangent with the weight, where that has no tangent itself."""
    x, weight, *rest = args
    value, tangent = forward_ad.unpack_dual(x)
    bias = rest[0] if rest else kwargs.get("bias")
    changing = [part for part in (weight, bias) if part is not None and forward_ad.unpack_dual(part)[1] is not None]
    if tangent is None or changing:
        return function(*args, **kwargs)
    answer = function(value, weight, *rest, **kwargs)
    with torch.no_grad():
        without_bias = (None, *rest[1:]) if rest else ()
        change = function(tangent, weight, *without_bias, **{k: v for k, v in kwargs.items() if k != "bias"})
    return forward_ad.make_dual(answer, change)


def _apart(function: Any, args: Any, kwargs: Any) -> Any:
    """The value of the primals alone, with its graph, and its tangent of a second call, without."""
    duals = _Duals()
    primals = [duals.primal(one) for one in args]
    named = {name: duals.primal(one) for name, one in kwargs.items()}
    if not (duals.told and duals.graph):
        return function(*args, **kwargs)
    value = function(*primals, **named)
    with torch.no_grad():
        if function in _LINEAR:
            change = function(forward_ad.unpack_dual(args[0]).tangent, *args[1:], **kwargs)
        else:
            change = forward_ad.unpack_dual(function(*args, **kwargs)).tangent
    return value if change is None else forward_ad.make_dual(value, change)


class _Duals:
    """What the arguments of a call are: whether any has a tangent, and any a graph."""

    told = graph = False

    def primal(self, one: Any) -> Any:
        """An argument, or a list of some, without tangents."""
        if isinstance(one, Tensor) and one.is_floating_point():
            value, tangent = forward_ad.unpack_dual(one)
            self.told |= tangent is not None
            self.graph |= value.requires_grad
            return value
        if isinstance(one, list | tuple) and any(isinstance(part, Tensor) for part in one):
            return [self.primal(part) for part in one]
        return one
