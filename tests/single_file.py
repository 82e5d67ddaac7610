"""A Stable Diffusion pipeline as the single file in which such models are traded, for tests that read one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(pipeline: Any, path: Path) -> Path:
    """UNet, autoencoder and text encoder of a pipeline in one file, in the names of their authors' code."""
    unet, vae, text = (getattr(pipeline, name) for name in ("unet", "vae", "text_encoder"))
    state = {f"model.diffusion_model.{_unet_name(k, unet)}": v for k, v in unet.state_dict().items()}
    state |= {f"first_stage_model.{_vae_name(k, vae)}": _vae_weight(k, v) for k, v in vae.state_dict().items()}
    for name, tensor in text.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _unet_name(name: str, unet: Any) -> str:
    layers = unet.config.layers_per_block
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    kind, block, part, index, rest = re.fullmatch(
        r"(down_blocks|up_blocks|mid_block)\.?(\d*)\.(\w+)\.(\d+)\.(.*)", name
    ).groups()
    if part == "resnets":
        first, _, suffix = rest.partition(".")
        rest = f"{_RESNET[first]}.{suffix}"
    if kind == "mid_block":
        return f"middle_block.{2 * int(index) if part == 'resnets' else 1}.{rest}"
    inside = {"resnets": 0, "attentions": 1}.get(part)
    if kind == "down_blocks":
        if part == "downsamplers":
            return f"input_blocks.{(layers + 1) * (int(block) + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{(layers + 1) * int(block) + int(index) + 1}.{inside}.{rest}"
    if part == "upsamplers":
        place = 2 if "CrossAttn" in unet.config.up_block_types[int(block)] else 1
        return f"output_blocks.{(layers + 1) * int(block) + layers}.{place}.{rest}"
    return f"output_blocks.{(layers + 1) * int(block) + int(index)}.{inside}.{rest}"


def _vae_name(name: str, vae: Any) -> str:
    last = len(vae.config.block_out_channels) - 1
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
    for ours, theirs in _VAE_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name


def _vae_weight(name: str, tensor: Tensor) -> Tensor:
    """Their attention is made of convolutions."""
    linear = "attentions" in name and name.endswith("weight") and tensor.ndim == 2
    return tensor[:, :, None, None] if linear else tensor
