"""Several roles on one frozen network: the teacher is the network itself, every other role a low-rank adapter of it.

A role is entered, never switched to: a context manager sets raw flags of the adapted layers, and restores them. PEFT's
own switches also set ``requires_grad``, which cuts a graph that is still to be walked backward; here no such flag
changes after a role is made. A checkpointed block runs again in the backward pass, when another role may be on: its
closure enters the role of its first run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from fewstep.errors import UserError
from fewstep.networks.adapted_linear import AdaptedLinear
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.in_dtype import cast, in_dtype
from fewstep.networks.merged import MergedForm
from fewstep.networks.recompute import Reenter, checkpointed
from fewstep.networks.roles import NetworkRole, Role, allow_checkpointing
from fewstep.recording import Recording
from fewstep.recording.pipeline import is_quantized, is_quantized_layer
from fewstep.recording.watch.hooks import hooked


class Backbone:
    """One frozen network and its adapters.

    Args:
        network: stock; its weights are shared where the dtype allows and never written, and it stays as it is. It may
            be quantised; its quantised layers are then shared as they are.
        rank: of every adapter.
        alpha: an adapter's product is scaled by alpha / rank.
        dtype: of the frozen weights; adapters are float32 at least.
        device: where it lives.
        gradient_checkpointing: recompute activations in the backward pass.
        without: full names of layers that get no adapter.
        mergeable: keep what :meth:`merged_form` needs; the weights are not to be moved or divided then.

    Raises:
        UserError: there is no layer to adapt, one that is smaller than the rank, or no gradient checkpointing.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
        without: Collection[str] = (),
        mergeable: bool = False,
    ) -> None:
        self.stock, self.rank, self.alpha = network, rank, alpha
        self.network = _prepared(on_the_same_weights(network), dtype, device)
        self.network.requires_grad_(False)
        self.targets = tuple(path for path in attention_linears(self.network) if path not in without)
        _refuse(network, self.targets, rank)
        self._plain = on_the_same_weights(self.network) if mergeable else None
        self._layers: list[LoraLayer] = []
        self._active: str | None = None
        #: Of roles that are told more than their adapter's name: called in a pass, what makes its context once more.
        self.reenter: dict[str | None, Callable[[], Reenter]] = {}
        if gradient_checkpointing:
            allow_checkpointing(self.network, self._checkpoint)

    def add(self, name: str, *, trainable: bool, seed: int) -> nn.Module:
        """A new adapter that changes nothing yet. Returns its own modules, ``<layer>.lora_A`` and ``<layer>.lora_B``.

        Args:
            name: of the role.
            trainable: whether it asks for gradients; fixed for the whole run.
            seed: of its first weights, the same on every process.
        """
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets))
        asked = {parameter: parameter.requires_grad for parameter in self.network.parameters()}
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
            inject_adapter_in_model(config, self.network, adapter_name=name)
        self._layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        for layer in self._layers:
            AdaptedLinear.take_over(layer)
        for parameter, wanted in asked.items():  # whatever PEFT does to earlier adapters
            parameter.requires_grad_(wanted)
        adapted: dict[str, LoraLayer] = {path: self.network.get_submodule(path) for path in self.targets}
        parts = {f"{path}.lora_A": layer.lora_A[name] for path, layer in adapted.items()}
        parts |= {f"{path}.lora_B": layer.lora_B[name] for path, layer in adapted.items()}
        adapter = _tree(parts)
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self._set(self._active)
        return adapter.requires_grad_(trainable)

    @contextmanager
    def active(self, name: str | None) -> Iterator[None]:
        """Inside, the network is the role ``name``; None for the bare network."""
        before = self._active
        if name == before:  # as in every block that is recomputed under its own role
            yield
            return
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    @torch.no_grad()
    def merged(self, adapter: nn.Module, onto: nn.Module | None = None) -> nn.Module:
        """A copy of the stock network with an adapter's product added to its weights, in the stock network's dtype.

        Args:
            adapter: from :meth:`add`.
            onto: the stock network in full precision, to which it is added in place.

        Raises:
            ValueError: the stock network is quantised, and ``onto`` is not given.
        """
        if onto is None and is_quantized(self.stock):
            raise ValueError("no product can be added to quantised weights")
        network = copy.deepcopy(self.stock) if onto is None else onto
        for path in self.targets:
            a, b = (adapter.get_parameter(f"{path}.{name}.weight") for name in ("lora_A", "lora_B"))
            weight = _linear(network, path).weight
            weight.add_((b @ a).to(weight), alpha=self.alpha / self.rank)
        return network

    def merged_form(self, adapter: nn.Module) -> MergedForm:
        """An adapter's role as a network of its own, for passes without gradient.

        Raises:
            ValueError: this backbone was not made for it.
        """
        if self._plain is None:
            raise ValueError("this backbone keeps no network without adapters")
        plain = self._plain
        scale = self.alpha / self.rank
        return MergedForm(lambda: on_the_same_weights(plain), self.network, adapter, self.targets, scale)

    def _set(self, name: str | None) -> None:
        # Past nn.Module.__setattr__, which looks for parameters and takes ten times as long.
        flags = {"_disable_adapters": name is None, "_active_adapter": [name]}
        for layer in self._layers:
            layer.__dict__.update(flags)
        self._active = name

    def _checkpoint(self, block: Callable[..., Any], *args: Any) -> Any:
        name = self._active
        told = self.reenter[name]() if name in self.reenter else nullcontext

        @contextmanager
        def again() -> Iterator[None]:
            with self.active(name), told():
                yield

        return checkpointed(block, args, again, inside=lambda: self._active == name)


class AdapterRole(NetworkRole):
    """A role that owns an adapter of a :class:`Backbone`; without one it is the frozen teacher and owns nothing.

    Args:
        name: of the role, and of its adapter.
        backbone: shared by all such roles of a run.
        denoiser: on the backbone's network, entering this role.
        adapter: from :meth:`Backbone.add`.
    """

    part = "adapter"
    is_adapter = True

    def __init__(
        self, name: str, backbone: Backbone, denoiser: NetworkDenoiser, adapter: nn.Module | None = None
    ) -> None:
        super().__init__(name, denoiser)
        self.backbone = backbone
        self.adapter = adapter

    @property
    def weights(self) -> nn.Module:
        return nn.Module() if self.adapter is None else self.adapter

    def stock_network(self, onto: nn.Module | None = None) -> nn.Module:
        """As :meth:`Role.stock_network`; an adapter of a quantised network needs it in full precision."""
        return self.backbone.stock if self.adapter is None else self.backbone.merged(self.adapter, onto)

    @torch.no_grad()
    def copy_weights(self, other: Role) -> None:
        """Take over the adapter of ``other``, or none of it where ``other`` is the teacher.

        Raises:
            ValueError: ``other`` is a full copy, which no adapter can equal.
        """
        if not isinstance(other, AdapterRole) or other.backbone is not self.backbone:
            raise ValueError(f"the {self.name} is an adapter and cannot become the {other.name}, a network of its own")
        if other.adapter is not None:
            self.weights.load_state_dict(other.weights.state_dict())
            return
        for name, parameter in self.weights.named_parameters():
            if name.endswith("lora_B.weight"):
                parameter.zero_()


def attention_linears(network: nn.Module) -> tuple[str, ...]:
    """Full names of the linear layers below an attention module, known by its class's name: all families have them."""
    found: dict[str, None] = {}
    for path, module in network.named_modules():
        if "Attention" in type(module).__name__ or "Attn" in type(module).__name__:
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{n}": None for n, m in module.named_modules() if n and isinstance(m, nn.Linear)}
    return tuple(found)


def called_by_keyword(recording: Recording, device: torch.device | str) -> set[str]:
    """Full names of the layers whose input has a name (in AnimateDiff), which PEFT's layers cannot take."""
    network = recording.network
    found: set[str] = set()

    def note(path: str, _layer: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if not args:
            found.add(path)

    with hooked({path: network.get_submodule(path) for path in attention_linears(network)}, before=note):
        recording.probe(device)
    return found


def _refuse(network: nn.Module, targets: tuple[str, ...], rank: int) -> None:
    kind = type(network).__name__
    if not targets:
        raise UserError(f"{kind} has no attention layer to adapt; leave out --lora_rank and train full copies")
    sizes = {path: _sides(_linear(network, path)) for path in targets}
    smallest = min(sizes, key=lambda path: min(sizes[path]))
    if rank > min(sizes[smallest]):
        a, b = sizes[smallest]
        raise UserError(
            f"--lora_rank {rank} is larger than a layer of {kind}: {smallest} is {a} by {b}; take at most {min(a, b)}"
        )


def _linear(network: nn.Module, path: str) -> nn.Linear:
    layer = network.get_submodule(path)
    assert isinstance(layer, nn.Linear)  # as every target, see `attention_linears`
    return layer


def _sides(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def on_the_same_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters are new objects on the same memory, so that what is asked of them stays its own.

    Quantised layers are the same objects: their libraries keep parts of the weights in attributes, and nothing is ever
    asked of them.
    """
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in _plain(network).values()}
    shared |= {id(buffer): buffer.detach() for buffer in network.buffers()}
    shared |= {id(layer): layer for layer in network.modules() if is_quantized_layer(layer)}
    return copy.deepcopy(network, shared)


def _prepared(network: nn.Module, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """In eval mode, on a device, its ordinary weights in a dtype; a quantised network is where it was loaded."""
    if not is_quantized(network):
        return in_dtype(network.to(device), dtype).eval()
    cast(network, _plain(network), dtype)
    return network.eval()


def _plain(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the layers that are not quantised, by their names."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, layer in network.named_modules()
        if not is_quantized_layer(layer)
        for name, parameter in layer.named_parameters(recurse=False)
    }


def _tree(parts: dict[str, nn.Module]) -> nn.Module:
    """A module that holds others under their full names; the names are those of the state that diffusers loads."""
    root = nn.Module()
    for path, module in parts.items():
        node = root
        *parents, leaf = path.split(".")
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(leaf, module)
    return root
