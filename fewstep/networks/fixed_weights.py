"""Layers under a forward derivative: two products each, of the input and of its tangent with the weight.

For want of a tangent of the weight torch makes one of zeros, and multiplies the input with it: a third product (seen in
torch 2.14.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Their arguments are the input, the weight, the bias, and what has no derivative.
_LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class FixedWeights(TorchFunctionMode):
    """Inside, a layer whose weight has no tangent is not asked for one.

    The tangent of its answer has no graph: this is for derivatives that are held fixed.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _LAYERS or len(args) < 2:
            return function(*args, **kwargs)
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
