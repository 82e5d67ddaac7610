"""Sizes of the published CLIP networks, and what their parameters are called in their files and in transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Tower:
    """One of the two transformers; mlp: width of the hidden layer of its blocks."""

    width: int
    layers: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class ClipShape:
    """The size of a CLIP network.

    embedding: of the space both towers end in. patch, side: of the pictures, in pixels. activation: as transformers
    calls it. vocabulary, context: number of tokens there are, and of those that the text tower takes. The last two
    tokens of the vocabulary are those that begin and end a text.
    """

    embedding: int
    image: Tower
    text: Tower
    patch: int
    activation: str
    side: int = 224
    vocabulary: int = 49408
    context: int = 77

    def config(self) -> Any:
        """The configuration of transformers' ``CLIPModel`` of this size."""
        from transformers import CLIPConfig

        both = {"hidden_act": self.activation, "layer_norm_eps": 1e-5, "projection_dim": self.embedding}
        text = {
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "bos_token_id": self.vocabulary - 2,
            "eos_token_id": self.vocabulary - 1,
            "pad_token_id": self.vocabulary - 1,
        }
        image = {"image_size": self.side, "patch_size": self.patch, "num_channels": 3}
        return CLIPConfig(
            text_config=_tower(self.text) | both | text,
            vision_config=_tower(self.image) | both | image,
            projection_dim=self.embedding,
        )


VIT_B_32 = ClipShape(512, Tower(768, 12, 12, 3072), Tower(512, 12, 8, 2048), 32, "quick_gelu")
VIT_L_14 = ClipShape(768, Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072), 14, "quick_gelu")
VIT_H_14 = ClipShape(1024, Tower(1280, 32, 16, 5120), Tower(1024, 24, 16, 4096), 14, "gelu")
VIT_G_14 = ClipShape(1024, Tower(1408, 40, 16, 6144), Tower(1024, 24, 16, 4096), 14, "gelu")

#: What OpenAI's and open_clip's names outside of the blocks are in transformers, where the projections are transposed.
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
#: Names that carry no weights: sizes in OpenAI's files, the causal mask in some of open_clip's, positions' numbers.
_NO_WEIGHTS = re.compile(
    r"input_resolution|context_length|vocab_size|attn_mask|(text|vision)_model\.embeddings\.position_ids"
)


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP network by the names of transformers' ``CLIPModel``.

    Names that neither layout knows stay as they are, so that loading strictly finds them.

    Args:
        state: tensors by name in OpenAI's and open_clip's layout, or in that of transformers.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _NO_WEIGHTS.fullmatch(name):
            continue
        if name in _OUTSIDE and tensor.ndim == 2 and name in _TRANSPOSED:
            found[_OUTSIDE[name]] = tensor.T.contiguous()
        elif name in _OUTSIDE:
            found[_OUTSIDE[name]] = tensor
        elif (block := _BLOCK.fullmatch(name)) is not None:
            tower = "vision_model" if block[1] else "text_model"
            found |= _inside(f"{tower}.encoder.layers.{block[2]}", block[3], tensor)
        else:
            found[name] = tensor
    return found


def _inside(block: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor of a block is in transformers: the three projections of its attention are one tensor elsewhere."""
    if name in ("attn.in_proj_weight", "attn.in_proj_bias") and len(tensor) % 3 == 0:
        kind = name.rpartition("_")[2]
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return {f"{block}.self_attn.{part}.{kind}": value.contiguous() for part, value in parts}
    module, _, kind = name.rpartition(".")
    return {f"{block}.{_INSIDE.get(module, module)}.{kind}": tensor}


def _tower(tower: Tower) -> dict[str, int]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp,
    }
