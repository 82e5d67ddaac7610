"""By which rule other programs find the layers of a LoRA's file, written from what their code does.

Each function says which layers of a network a program finds among the names of a file. The networks are named by
diffusers' class, the layers by their full names there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Reader = Callable[[set[str], str, Iterable[str]], set[str]]

_COMFYUI_SUFFIXES = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
)
_UNET_LAYERS = re.compile(
    r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2))|resnets\.\d+\.time_emb_proj)"
)
_ATTENTION = r"attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"


def comfyui(names: set[str], network: str, layers: Iterable[str]) -> set[str]:
    """ComfyUI makes the names that it knows of the model's own layers and looks each of them up in the file."""

    def known(path: str) -> list[str]:
        if network == "UNet2DConditionModel" and _UNET_LAYERS.fullmatch(path):
            old = path.replace(".to_", ".processor.to_")
            old = old[:-2] if old.endswith(".to_out.0") else old
            flat = path.replace(".", "_")
            return [f"lora_unet_{flat}", f"lycoris_{flat}", old, f"unet.{old}"]
        if network in ("FluxTransformer2DModel", "ChromaTransformer2DModel", "SD3Transformer2DModel"):
            found = re.fullmatch(rf"(single_)?transformer_blocks\.\d+\.{_ATTENTION}", path)
            return [f"transformer.{path}", f"lora_transformer_{path.replace('.', '_')}"] if found else []
        if network == "QwenImageTransformer2DModel":
            return [path, f"transformer.{path}", f"diffusion_model.{path}"]
        if network == "ZImageTransformer2DModel":
            found = re.fullmatch(r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)", path)
            return [path, f"transformer.{path}", f"diffusion_model.{path}"] if found else []
        if network == "LTXVideoTransformer3DModel":
            return [f"diffusion_model.{path}"]
        if network == "WanTransformer3DModel":
            return [f"diffusion_model.{_wan(path)}"]
        return []

    return {
        path
        for path in layers
        if any(
            f"{name}{up}" in names and f"{name}{down}" in names
            for name in known(path)
            for up, down in _COMFYUI_SUFFIXES
        )
    }


def lycoris(names: set[str], network: str, layers: Iterable[str]) -> set[str]:
    """LyCORIS takes what stands before the first dot, and compares it with its own prefix and a module's flat name."""
    heads = {name.split(".")[0] for name in names if "." in name}
    flat = {path: f"lora_unet_{path}".replace(".", "_") for path in layers}
    held = {path for path, head in flat.items() if head in heads}
    return {path for path in held if f"{flat[path]}.lora_up.weight" in names}


def diffsynth(names: set[str], network: str, layers: Iterable[str]) -> set[str]:
    """DiffSynth-Studio takes the factor's name out of a key; what is left must be the name of one of its modules."""
    if network == "FluxTransformer2DModel":  # which has a table of diffusers' names
        known = {f"transformer.{path}.lora_B.weight": path for path in layers}
        return {path for name, path in known.items() if name in names}
    own = {(_wan(path) if network == "WanTransformer3DModel" else path): path for path in layers}
    found = set()
    for name in names:
        for up in ("lora_up", "lora_B"):
            parts = name.split(".")
            if up in parts:
                parts = parts[: parts.index(up)]
                found.add(".".join(parts[1:] if parts[0] == "diffusion_model" else parts))
    return {path for name, path in own.items() if name in found}


def stable_diffusion_cpp(names: set[str], network: str, layers: Iterable[str]) -> set[str]:
    """stable-diffusion.cpp makes dots of a UNet's underlines, but for those in a list of words."""
    words = ["to_k", "to_q", "to_v", "to_out", "down_blocks", "mid_block", "up_block", "proj_in", "proj_out"]
    words += ["transformer_blocks", "time_emb_proj", "conv_in", "conv_out", "conv_shortcut", "time_embedding"]
    found = set()
    for name in names:
        kept, _, factor = name.partition(".lora_up.weight")
        if factor or not kept.startswith("lora_unet_") or kept == name:
            continue
        kept = kept.removeprefix("lora_unet_")
        for word in words:
            kept = kept.replace(word, word.replace("_", "\0"))
        found.add(kept.replace("_", ".").replace("\0", "_"))
    return found & set(layers)


def _wan(path: str) -> str:
    """The name of an attention's layer in Wan's own code."""
    block, attention, layer = re.fullmatch(r"(blocks\.\d+)\.(attn[12])\.(.+)", path).groups()
    own = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img"}
    return f"{block}.{'self_attn' if attention == 'attn1' else 'cross_attn'}.{own[layer]}"


#: By the names that a student's card has for them.
RULES: dict[str, Reader] = {
    "ComfyUI": comfyui,
    "LyCORIS": lycoris,
    "DiffSynth-Studio": diffsynth,
    "stable-diffusion.cpp": stable_diffusion_cpp,
}
