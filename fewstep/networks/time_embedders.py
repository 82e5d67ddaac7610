"""Where a network makes something of its time: the modules at which a student can be told a second one.

They are observed, so that no family is known by name: the innermost blocks whose output changes with the time and not
with the sample, and of those the ones that come first. Most networks have one; DiT has one in each of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.recording.watch.hooks import hooked

Call = Callable[[Tensor, Tensor], Any]


@torch.no_grad()
def find_time_embedders(network: nn.Module, call: Call, x: Tensor, t: Tensor) -> dict[str, int]:
    """Names of the modules, in the order of their calls, and the width D of their outputs (B, ..., D).

    Args:
        network: a stock diffusers network.
        call: calls it on a sample and times of the shapes of ``x`` and ``t``.
        x: a sample (B, ...).
        t: times (B,).

    Raises:
        UserError: there is no such module.
    """
    names = [name for name, module in network.named_modules() if name and any(True for _ in module.children())]
    names = [name for name in names if any(True for _ in network.get_submodule(name).parameters())]
    plain, widths = _prints(network, names, call, x, t)
    other_x, _ = _prints(network, names, call, x.flip(0) + 1, t)
    other_t, _ = _prints(network, names, call, x, t / 2)
    timed = [n for n in plain if torch.equal(plain[n], other_x[n]) and not torch.equal(plain[n], other_t[n])]
    inner = [name for name in timed if not any(other.startswith(f"{name}.") for other in timed)]
    sites: dict[str, int] = {}
    while inner:
        first = inner.pop(0)
        sites[first] = widths[first]
        with hooked({first: network.get_submodule(first)}, after=_disturb):
            disturbed, _ = _prints(network, inner, call, x, t)
        inner = [name for name in inner if torch.equal(disturbed[name], plain[name])]
    if not sites:
        raise UserError(
            f"{type(network).__name__} has no module that makes something of the time alone, where a student could be "
            "told a second one"
        )
    return sites


def likely_time_embedders(network: nn.Module) -> dict[str, int]:
    """What :func:`find_time_embedders` would find, where nothing can be observed: by names of diffusers' classes."""
    found = {}
    for name, module in network.named_modules():
        linear = [child for child in module.modules() if isinstance(child, nn.Linear)]
        if type(module).__name__ in ("TimestepEmbedding", "TimestepEmbedder") and linear:
            found[name] = linear[-1].out_features
    return found


def _prints(
    network: nn.Module, names: list[str], call: Call, x: Tensor, t: Tensor
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Two numbers that tell a module's first output from another one, and its last axis; in the order of the calls."""
    prints: dict[str, Tensor] = {}
    widths: dict[str, int] = {}

    def note(name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if name in prints or not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
            return
        if output.shape[0] % x.shape[0] == 0:
            values = output.double()
            prints[name], widths[name] = torch.stack([values.sum(), values.square().sum()]), output.shape[-1]

    with hooked({name: network.get_submodule(name) for name in names}, after=note):
        call(x, t)
    return prints, widths


def _disturb(_name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    """Another output in the place of a module's own, so that what follows from it changes."""
    return output + torch.cos(3 * output) + 1
