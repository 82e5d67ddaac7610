"""A role that is an adapter, as a network of its own for passes without gradient: its product added to a weight's copy.

A walk of the student asks the same weights again and again, each time through the two small layers beside every adapted
one. Added once after each update, the product costs less than one such pass. The frozen weights themselves are never
written: adding and taking away would round, and the teacher is to stay what it was to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MergedForm:
    """Gives the network that answers as an adapter's role does, made when it is first wanted and kept up to date.

    Args:
        plain: makes the network without adapters, of new parameters on the frozen weights' memory.
        adapted: the network with them, whose attention processors it has too.
        adapter: from :meth:`fewstep.networks.adapters.Backbone.add`.
        targets: full names of the adapted layers.
        scale: of the adapter's product.
    """

    def __init__(
        self,
        plain: Callable[[], nn.Module],
        adapted: nn.Module,
        adapter: nn.Module,
        targets: tuple[str, ...],
        scale: float,
    ) -> None:
        self._plain, self._adapted, self._adapter, self._targets, self._scale = plain, adapted, adapter, targets, scale
        self._network: nn.Module | None = None
        #: Of each adapted layer: where the sum goes, the frozen weight, and the adapter's two factors.
        self._layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._versions: list[int] = []

    @torch.no_grad()
    def __call__(self) -> nn.Module:
        """The network as the adapter is now."""
        network = self._network = self._network or self._make()
        # Every change in place counts a tensor's version up, on the host: nothing is read from the device.
        versions = [part._version for _, _, a, b in self._layers for part in (a, b)]
        if versions != self._versions:
            for merged, frozen, a, b in self._layers:
                merged.copy_(torch.addmm(frozen.to(a), b, a, alpha=self._scale))
            for path, module in network.named_modules():  # a run may have switched them
                if hasattr(module, "processor"):
                    module.processor = self._adapted.get_submodule(path).processor
            self._versions = versions
        return network

    def _make(self) -> nn.Module:
        network = self._plain()
        for path in self._targets:
            layer = network.get_submodule(path)
            assert isinstance(layer, nn.Linear)  # as every target is
            a, b = (self._adapter.get_parameter(f"{path}.{name}.weight") for name in ("lora_A", "lora_B"))
            frozen = layer.weight.detach()
            layer.weight = nn.Parameter(torch.empty_like(frozen), requires_grad=False)
            self._layers.append((layer.weight.detach(), frozen, a, b))
        return network
