"""PickScore v1: what people on Pick-a-Pic would prefer."""

from __future__ import annotations

import torch

from fewstep.eval.scorers.clip_network import ClipNetwork, CosineScorer, open_model
from fewstep.eval.scorers.clip_shapes import VIT_H_14
from fewstep.eval.scorers.clip_tokens import ClipTokens, open_tokenizer
from fewstep.eval.scorers.files import first_found
from fewstep.eval.scorers.pixels import transformers_pixels
from fewstep.eval.weights import WeightFile, Weights

FILES = tuple(
    WeightFile(f"PickScore_v1/{name}", "PickScore v1, a CLIP ViT-H-14", hub="yuvalkirstain/PickScore_v1")
    for name in ("model.safetensors", "pytorch_model.bin")
)


def pick_scorer(network: ClipNetwork, sha256: str, verified: bool) -> CosineScorer:
    """exp(logit scale) x cosine of a picture's and its prompt's features in a CLIP ViT-H-14 trained on preferences.

    Kirstain et al. 2023 (arXiv 2305.01569), equation 1, with pictures and prompts as in its repository's example: no
    ftfy, Pillow's bicubic filter. About 20 to 23 for pictures of today's models; a training against it games it.
    """
    name = "PickScore v1, exp(logit scale) x cosine; bicubic to 224, centre"
    return CosineScorer(name, ("pick",), network, float(network.model.logit_scale.double().exp()), sha256, verified)


def open_pick_scorer(weights: Weights, device: torch.device | str = "cpu") -> CosineScorer:
    """PickScore v1 with its published weights. Errors as :func:`fewstep.eval.scorers.clip_score.open_clip_scorer`."""
    found = first_found(weights, FILES)
    tokens = ClipTokens(open_tokenizer(weights), VIT_H_14.context, cleaned=False)
    network = ClipNetwork(open_model(VIT_H_14, found, device), tokens, transformers_pixels)
    return pick_scorer(network, found.sha256, found.verified)
