"""A network in another dtype as diffusers itself loads it: what its class keeps in float32 stays there.

Some networks are less right with all of their weights in half precision: Wan keeps its time embedder, its norms and
its tables in float32, and says so in ``_keep_in_fp32_modules``, the parts of names that
``from_pretrained(torch_dtype=...)`` heeds. ``nn.Module.to`` does not, and it casts what is made with the network and
lies in no file (rotary positions), too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``network`` itself, with the dtypes that diffusers would load it with.

    Args:
        network: any; of diffusers' kind it may say which of its parts stay in float32.
        dtype: of all other floating-point weights. None of them is kept below it.
    """
    if dtype.itemsize >= torch.float32.itemsize:
        return nn.Module.to(network, dtype)
    cast(network, dict(network.named_parameters()) | _saved_buffers(network), dtype)
    return network


def cast(network: nn.Module, named: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The same of some of its weights, which are given by their names in ``network``."""
    kept = frozenset(getattr(network, "_keep_in_fp32_modules", None) or ())
    full = torch.promote_types(dtype, torch.float32)
    for name, tensor in named.items():
        wanted = full if kept.intersection(name.split(".")) else dtype
        if tensor.is_floating_point() and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def _saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Those that lie in its files, by name."""
    own = network.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in network.named_buffers() if name in own}
