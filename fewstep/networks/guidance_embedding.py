"""Guidance as an input of the network: telling it a guidance_scale for each sample.

A network that is guidance-distilled (Flux) is told its guidance. A diffusers UNet has room for it
(``time_cond_proj_dim``), which its pipelines fill by themselves once it is there (Meng et al. 2023, arXiv 2210.03142;
LCM, §4.3).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, RaggedConditioning
from fewstep.conditioning.tree import Leaf
from fewstep.diffusion.scales import GuidanceScale
from fewstep.errors import UserError
from fewstep.recording import Recording, record
from fewstep.recording.guidance.runs import scale_arguments
from fewstep.recording.pipeline import with_parts

#: Size of the embedding where a network gets one, as in LCM.
_SIZE = 256


@dataclass(frozen=True)
class GuidanceEmbedding:
    """How a network is told a guidance_scale.

    Attributes:
        argument: of the network.
        value: what it is given (B, ...) for scales (B,) in diffusers' convention.
        dtype: of what it is given.
        default: the scale that it was told in the recording.
        heeded: whether the teacher heeds what it is told; else it is guided by the same scale.
    """

    argument: str
    value: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    default: float
    heeded: bool

    @overload
    def tell(self, conditioning: Conditioning, guidance_scale: Tensor) -> Conditioning: ...
    @overload
    def tell(self, conditioning: AnyConditioning, guidance_scale: Tensor) -> AnyConditioning: ...
    def tell(self, conditioning: AnyConditioning, guidance_scale: Tensor) -> AnyConditioning:
        """The same conditioning of B samples with other scales (B,), which lie on its device.

        Their further answers are told the default: guidance leads away from what the network says by itself.
        """
        if isinstance(conditioning, RaggedConditioning):
            groups = [(rows, self._tell(part, guidance_scale[list(rows)])) for rows, part in conditioning.groups]
            return RaggedConditioning(groups)
        return self._tell(conditioning, guidance_scale)

    def _tell(self, conditioning: Conditioning, guidance_scale: Tensor) -> Conditioning:
        leaf = Leaf(self.value(guidance_scale).to(self.dtype), rows=1)
        by_default = torch.full((conditioning.batch_size,), self.default, device=guidance_scale.device)
        others = [self._tell(other, by_default) for other in conditioning.others]
        return Conditioning({**conditioning.tree, self.argument: leaf}, conditioning.batch_size, others)


def find_guidance_embedding(recording: Recording, *, heeded: bool) -> GuidanceEmbedding:
    """How the recorded network is told its guidance: the rule that gives what it was told in the recording.

    Args:
        recording: of a network with an input for it.
        heeded: whether the teacher heeds it.

    Raises:
        UserError: it is told nothing, or something unknown.
    """
    invocation = recording.invocation
    scales = [invocation.default(name) for name in scale_arguments(invocation) if name not in recording.off]
    scales = [scale for scale in scales if isinstance(scale, int | float)]
    for argument in recording.embedded:
        leaf = recording.marked[argument]
        if not isinstance(leaf, Leaf) or leaf.rows != 1 or not isinstance(leaf.value, Tensor):
            continue
        for rule in _rules(leaf.value):
            told = leaf.value.double().cpu()
            for scale in scales:
                if _agree(rule(torch.tensor([float(scale)])), told):
                    return GuidanceEmbedding(argument, rule, leaf.value.dtype, float(scale), heeded)
    raise _lacking(recording.network)


def likely_guidance_embedding(recording: Recording, default: float) -> GuidanceEmbedding:
    """The same by the shape of what it was told alone, for the plan of a run: there are no values to compare.

    Args:
        recording: of a network with an input for it.
        default: the scale that it is told by default.
    """
    argument = min(recording.embedded)
    told = recording.marked[argument].value
    return GuidanceEmbedding(argument, _rules(told)[0], told.dtype, default, heeded=True)


def with_guidance_embedding(recording: Recording, guidance_scale: GuidanceScale, *, trained: bool) -> Recording:
    """A recording whose network is told its guidance: this one, or of the same pipeline with room made in its network.

    Until it is trained the new network is the old one for every guidance: its new weights are zero.

    Args:
        recording: of the teacher.
        guidance_scale: at which the network is told to be by default.
        trained: whether all of the network's weights are trained, new ones with them.

    Raises:
        UserError: the network has no room for a guidance, or its pipeline does not fill it, or it could not be trained.
    """
    if recording.embedded:
        return recording
    network = recording.network
    known = inspect.signature(type(network).__init__).parameters
    # A scale for each of several experts: no single network has room for it.
    if not isinstance(guidance_scale, int | float) or len(recording.experts) > 1 or "time_cond_proj_dim" not in known:
        raise _lacking(network)
    if not trained:
        raise UserError("--guidance_embedding adds weights that no LoRA holds; leave out --lora_rank or the embedding")
    pipeline = with_parts(recording.pipeline, **{recording.component: _with_room(network)})
    report = recording.guidance
    name = report.off_argument[0] if report.off_argument else "guidance_scale"
    told = record(pipeline, **{**recording.call, name: guidance_scale - (report.offset or 0.0)})
    if not told.embedded:
        raise _lacking(network)
    told.prove()
    return told


def _with_room(network: nn.Module) -> nn.Module:
    """The network with a guidance embedding whose weights are zero."""
    # The hidden entries say which of the others were defaults, and would win over the new one.
    stock: Any = network  # a diffusers model has more than an nn.Module: config, from_config and dtype
    config = {key: copy.deepcopy(value) for key, value in stock.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        roomy = type(stock).from_config(config | {"time_cond_proj_dim": _SIZE})
    parameter = next(network.parameters())
    roomy.to(parameter.device)
    if roomy.dtype != parameter.dtype:
        roomy.to(parameter.dtype)
    missing, unexpected = roomy.load_state_dict(network.state_dict(), strict=False)
    if unexpected or any(".cond_proj." not in name for name in missing):
        raise _lacking(network)
    for name in missing:
        nn.init.zeros_(roomy.get_parameter(name))
    return roomy.eval()


def _rules(told: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """What pipelines tell their networks: the scale, a thousand times it, or the embedding of what is beyond 1."""
    if told.dim() == 2:
        size = told.shape[1]
        return [lambda scale: guidance_embedding(scale, size)]
    return [lambda scale: scale, lambda scale: 1000 * scale]


def _agree(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-2 * b.abs().max())  # sines of large float32 numbers


def _lacking(network: nn.Module) -> UserError:
    return UserError(
        f"{type(network).__name__} has no guidance embedding, nor room for one that its pipeline would fill; "
        "leave out --guidance_embedding, and the guidance is trained in"
    )


def guidance_embedding(guidance_scale: Tensor, size: int = 256, period: float = 1e4, scale: float = 1e3) -> Tensor:
    """LCM's embedding (B, size) of ``guidance_scale`` (B,): sines, then cosines, of scale * (w - 1) at many rates.

    LCM writes guidance as c + w' (c - u); diffusers' w is w' + 1, and pipelines embed w' likewise.
    """
    half = size // 2
    rates = torch.exp(-math.log(period) / (half - 1) * torch.arange(half, dtype=torch.float64))
    phase = scale * (guidance_scale.double() - 1)[:, None] * rates.to(guidance_scale.device)
    return torch.cat([phase.sin(), phase.cos()], 1)
