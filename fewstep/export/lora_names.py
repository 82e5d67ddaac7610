"""The names under which other programs look for a LoRA's layers, and the files that hold a student under these names.

Every reader has a rule of its own, and leaves out a layer that its rule does not name, mostly without a word. Who reads
the file for diffusers needs no other; for the rest the same tensors are written once more. All readers agree on the
numbers, since alpha is the rank (:mod:`fewstep.export.lora`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Names:
    """One way to name the tensors of a LoRA.

    Attributes:
        file: that holds them.
        layer: the name of a layer, of its full name in diffusers.
        down: what follows the layer's name in that of A.
        up: and of B.
        alpha: whether each layer's alpha is written as well.
    """

    file: str
    layer: Callable[[str], str]
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = False

    def state(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a file.

        Args:
            factors: layer -> (A, B), of shapes (rank, in, ...) and (out, rank, ...), to be scaled by 1.
        """
        state: dict[str, Tensor] = {}
        for path, (a, b) in factors.items():
            name = self.layer(path)
            state |= {f"{name}.{self.down}": a, f"{name}.{self.up}": b}
            if self.alpha:
                state[f"{name}.alpha"] = torch.tensor(float(len(a)))
        return state

    def file_of(self, component: str, first: str) -> str:
        """The file of a network, where several have one each and ``first`` is the one that comes without its name."""
        return self.file if component == first else self.file.replace(".", f"_{component}.")


def _wan(path: str) -> str:
    """The name in the model's own code, of which diffusers has another version."""
    for theirs, own in _WAN:
        path = path.replace(theirs, own)
    return f"diffusion_model.{path}"


_WAN = (
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".to_out.0", ".o"),
    (".add_k_proj", ".k_img"),
    (".add_v_proj", ".v_img"),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
)

#: As kohya-ss' trainer names the layers of a UNet.
KOHYA = Names(
    "lora_kohya.safetensors",
    lambda path: f"lora_unet_{path.replace('.', '_')}",
    "lora_down.weight",
    "lora_up.weight",
    alpha=True,
)
#: diffusers' own names, without that of the network before them.
BARE = Names("lora_without_prefix.safetensors", lambda path: path)
#: diffusers' own names, after the one word that says which network.
DIFFUSION_MODEL = Names("lora_diffusion_model.safetensors", lambda path: f"diffusion_model.{path}")
#: The names of Wan's own code.
WAN = Names("lora_original_names.safetensors", _wan)

#: By the network's class: which programs take its LoRA, and under which names; None: they read the file for diffusers.
READERS: dict[str, dict[str, Names | None]] = {
    "UNet2DConditionModel": {
        "ComfyUI": KOHYA,
        "stable-diffusion.cpp": KOHYA,
        "LyCORIS": KOHYA,
        "DiffSynth-Studio": BARE,
    },
    "SD3Transformer2DModel": {"ComfyUI": None},
    "FluxTransformer2DModel": {"ComfyUI": None, "DiffSynth-Studio": None},
    "ChromaTransformer2DModel": {"ComfyUI": None},
    "QwenImageTransformer2DModel": {"ComfyUI": None, "DiffSynth-Studio": BARE},
    "ZImageTransformer2DModel": {"ComfyUI": None, "DiffSynth-Studio": BARE},
    "LTXVideoTransformer3DModel": {"ComfyUI": DIFFUSION_MODEL},
    "WanTransformer3DModel": {"ComfyUI": WAN, "DiffSynth-Studio": WAN},
}


def further_names(network_class: str) -> list[Names]:
    """The names that a network's LoRA is written under besides those of diffusers."""
    found = READERS.get(network_class, {}).values()
    return list({names.file: names for names in found if names is not None}.values())
