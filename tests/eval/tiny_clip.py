"""A tiny CLIP in the published layout, and what it answers by the published formulas, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from fewstep.eval.scorers.clip_network import ClipNetwork
from fewstep.eval.scorers.clip_shapes import ClipShape, Tower, as_transformers
from fewstep.eval.scorers.clip_tokens import ClipTokens, tokenizer_of
from fewstep.eval.scorers.pixels import DEVIATION, MEAN, Resize, clip_pixels
from fewstep.eval.weights import load_strictly

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>"]
VOCABULARY = 2 * 256 + len(MERGES) + 2
TINY = ClipShape(12, Tower(32, 2, 4, 40), Tower(16, 3, 2, 24), 8, "gelu", side=32, vocabulary=VOCABULARY)
QUICK = ClipShape(12, Tower(32, 2, 4, 40), Tower(16, 3, 2, 24), 8, "quick_gelu", side=32, vocabulary=VOCABULARY)

#: The parameters of OpenAI's and open_clip's files: their tower, and letters for sizes, as `published` reads them.
_OUTSIDE = {
    "text_projection": "text w e",
    "logit_scale": "text",
    "token_embedding.weight": "text v w",
    "positional_embedding": "text c w",
    "ln_final.weight": "text w",
    "ln_final.bias": "text w",
    "visual.class_embedding": "image w",
    "visual.positional_embedding": "image n w",
    "visual.proj": "image w e",
    "visual.conv1.weight": "image w 3 p p",
    "visual.ln_pre.weight": "image w",
    "visual.ln_pre.bias": "image w",
    "visual.ln_post.weight": "image w",
    "visual.ln_post.bias": "image w",
}
_BLOCK = {
    "ln_1.weight": "w",
    "ln_1.bias": "w",
    "attn.in_proj_weight": "3w w",
    "attn.in_proj_bias": "3w",
    "attn.out_proj.weight": "w w",
    "attn.out_proj.bias": "w",
    "ln_2.weight": "w",
    "ln_2.bias": "w",
    "mlp.c_fc.weight": "m w",
    "mlp.c_fc.bias": "m",
    "mlp.c_proj.weight": "w m",
    "mlp.c_proj.bias": "w",
}


def published(shape: ClipShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in OpenAI's and open_clip's files of a network of this size."""
    towers = {"text": shape.text, "image": shape.image}
    shared = {"e": shape.embedding, "v": shape.vocabulary, "c": shape.context, "p": shape.patch, "3": 3}
    shared["n"] = (shape.side // shape.patch) ** 2 + 1

    def sizes(tower: Tower, letters: Sequence[str]) -> tuple[int, ...]:
        known = shared | {"w": tower.width, "3w": 3 * tower.width, "m": tower.mlp}
        return tuple(known[letter] for letter in letters)

    found = {name: sizes(towers[text.split()[0]], text.split()[1:]) for name, text in _OUTSIDE.items()}
    for prefix, tower in (("transformer", shape.text), ("visual.transformer", shape.image)):
        for layer in range(tower.layers):
            for name, letters in _BLOCK.items():
                found[f"{prefix}.resblocks.{layer}.{name}"] = sizes(tower, letters.split())
    return found


def random_state(shape: ClipShape, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by their published names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(size, generator=generator) for name, size in published(shape).items()}


def tiny_network(
    state: Mapping[str, Tensor],
    shape: ClipShape = TINY,
    resize: Resize = clip_pixels,
    *,
    cleaned: bool = True,
    batch_size: int = 32,
) -> ClipNetwork:
    """The package's own network with these weights."""
    from transformers import CLIPModel

    model: Any = load_strictly(CLIPModel(shape.config()), as_transformers(state), "a test")  # type: ignore[arg-type]
    return ClipNetwork(model, ClipTokens(tokenizer_of(MERGES), shape.context, cleaned=cleaned), resize, batch_size)


def picture_features(state: Mapping[str, Tensor], shape: ClipShape, pixels: Tensor) -> Tensor:
    """Radford et al. 2021 in float64: pixels (N, 3, H, W) in [0, 1] -> features of length 1 (N, e)."""
    weights = {name.removeprefix("visual."): t.double() for name, t in state.items() if name.startswith("visual.")}
    mean, deviation = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    patches = conv2d((pixels.double() - mean) / deviation, weights["conv1.weight"], stride=shape.patch)
    first = weights["class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + weights["positional_embedding"]
    x = _blocks(_norm(x, weights, "ln_pre"), weights, shape.image, shape.activation, causal=False)
    x = _norm(x[:, 0], weights, "ln_post") @ weights["proj"]
    return x / x.norm(dim=1, keepdim=True)


def prompt_features(state: Mapping[str, Tensor], shape: ClipShape, tokens: Tensor) -> Tensor:
    """Radford et al. 2021 in float64: tokens (N, context) -> features of length 1 (N, e), read at the last mark."""
    weights = {name: tensor.double() for name, tensor in state.items() if not name.startswith("visual.")}
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = _norm(_blocks(x, weights, shape.text, shape.activation, causal=True), weights, "ln_final")
    x = x[torch.arange(len(x)), tokens.argmax(dim=1)] @ weights["text_projection"]
    return x / x.norm(dim=1, keepdim=True)


def _blocks(x: Tensor, weights: Mapping[str, Tensor], tower: Tower, activation: str, *, causal: bool) -> Tensor:
    length, hidden = x.shape[1], tower.width // tower.heads
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1) if causal else torch.zeros(1, dtype=x.dtype)
    for layer in range(tower.layers):
        block = f"transformer.resblocks.{layer}."
        inner = {name.removeprefix(block): tensor for name, tensor in weights.items() if name.startswith(block)}
        y = linear(_norm(x, inner, "ln_1"), inner["attn.in_proj_weight"], inner["attn.in_proj_bias"])
        q, k, v = (part.unflatten(2, (tower.heads, hidden)).transpose(1, 2) for part in y.chunk(3, dim=2))
        seen = (q @ k.transpose(2, 3) / math.sqrt(hidden) + mask).softmax(dim=3) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), inner["attn.out_proj.weight"], inner["attn.out_proj.bias"])
        y = linear(_norm(x, inner, "ln_2"), inner["mlp.c_fc.weight"], inner["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else gelu(y)
        x = x + linear(y, inner["mlp.c_proj.weight"], inner["mlp.c_proj.bias"])
    return x


def _norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


class Archive(nn.Module):
    """Parameters under the given names, for TorchScript: what OpenAI's files are."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))

    def forward(self) -> int:
        return 0
