"""What all samples of a batch share, on a device: one tensor for each content, however often that is moved there.

Two batches can be joined where what they share is equal. Of one and the same tensor that is known without a look at the
device, for which the host would wait. What is moved is on the host, where it is known by a digest.
"""

from __future__ import annotations

import hashlib
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: Nothing is kept alive: neither what was moved, with the version that it had then,
_moved: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()
_versions = WeakIdKeyDictionary()
#: nor from what, with the version of which there is a digest.
_digests = WeakIdKeyDictionary()


def moved(value: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """As ``value.to(device, dtype)``, with real floating tensors alone cast; the same tensor for the same content.

    Args:
        value: shared by all samples; nobody changes it in place.
        device: to move to; None for where it is.
        dtype: of floating tensors; None for their own.
    """
    # Towards a GPU the host need not wait; on the way back it has to.
    ahead = device is not None and torch.device(device).type == "cuda"
    dtype = dtype if dtype is not None and value.is_floating_point() else value.dtype
    if value.device.type != "cpu" or type(value) is not Tensor or value.requires_grad or value.is_inference():
        return value.to(device=device, dtype=dtype, non_blocking=ahead)
    key = (str(device), dtype, value.dtype, tuple(value.shape), _digest(value))
    known = _moved.get(key)
    if known is None or known._version != _versions[known]:
        known = _moved[key] = value.to(device=device, dtype=dtype, non_blocking=ahead)
        _versions[known] = known._version
    return known


def _digest(value: Tensor) -> bytes:
    known = _digests.get(value)
    if known is None or known[0] != value._version:
        flat = torch.view_as_real(value) if value.is_complex() else value
        content = flat.detach().contiguous().flatten().view(torch.uint8).numpy().data
        known = _digests[value] = value._version, hashlib.blake2b(content, digest_size=16).digest()
    digest: bytes = known[1]
    return digest
