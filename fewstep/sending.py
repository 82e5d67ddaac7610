"""Numbers of the host on a device, without a wait of the host for it: sent ahead, and not read back where known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: What tensors on a device hold, with the version that they had then; it keeps none of them alive.
_known = WeakIdKeyDictionary()


def sent(
    values: Sequence[float] | Sequence[int] | Sequence[bool], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """The numbers (N,) on ``device``.

    ``torch.tensor(values, device=device)`` waits until the device has done all that it was told before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def known(tensor: Tensor, host: Tensor) -> Tensor:
    """``tensor``, of which the host remembers that it holds what ``host`` holds."""
    if tensor.device.type != "cpu" and not tensor.is_inference():  # such have no version
        _known[tensor] = tensor._version, host
    return tensor


def on_host(tensor: Tensor) -> Tensor | None:
    """What a tensor holds, on the CPU, where the host knows that without asking a device."""
    if tensor.device.type == "cpu":
        return tensor
    version, host = _known.get(tensor, (None, None))
    return host if version is not None and version == tensor._version else None


def known_too(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, which the host knows too where it knows all of them: it computes a few numbers twice."""
    result = function(*tensors)
    hosts = [on_host(tensor) for tensor in tensors]
    if result.device.type == "cpu" or any(host is None for host in hosts):
        return result
    return known(result, function(*hosts))
