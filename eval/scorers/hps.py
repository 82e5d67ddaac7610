"""HPS v2.1: what people would prefer, by a CLIP ViT-H-14 in open_clip's layout."""

from __future__ import annotations

import torch

from fewstep.eval.scorers.clip_network import ClipNetwork, CosineScorer, open_model
from fewstep.eval.scorers.clip_shapes import VIT_H_14
from fewstep.eval.scorers.clip_tokens import ClipTokens, open_tokenizer
from fewstep.eval.scorers.files import first_found
from fewstep.eval.scorers.pixels import padded_pixels
from fewstep.eval.weights import WeightFile, Weights

FILES = (
    WeightFile(
        "HPS_v2.1_compressed.pt",
        "HPS v2.1, a CLIP ViT-H-14",
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        size=1972490005,
        hub="xswu/HPSv2",
    ),
)


def hps_scorer(network: ClipNetwork, sha256: str, verified: bool) -> CosineScorer:
    """100 x cosine of a picture's and its prompt's features in a CLIP ViT-H-14 trained on preferences.

    Wu et al. 2023 (arXiv 2306.09341), version 2.1, whose tables show it times 100. The pictures are not cropped but
    padded, as its package does it. v2.0 has another scale: 27.7 there is 30.6 here. Its package computes in half
    precision on a GPU, this in float32 everywhere.
    """
    name = "HPS v2.1, 100 x cosine; longer side bicubic to 224, black beside the shorter"
    return CosineScorer(name, ("hps",), network, 100.0, sha256, verified)


def open_hps_scorer(weights: Weights, device: torch.device | str = "cpu") -> CosineScorer:
    """HPS v2.1 with its published weights. Errors as :func:`fewstep.eval.scorers.clip_score.open_clip_scorer`."""
    found = first_found(weights, FILES)
    tokens = ClipTokens(open_tokenizer(weights), VIT_H_14.context, cleaned=True)
    network = ClipNetwork(open_model(VIT_H_14, found, device), tokens, padded_pixels)
    return hps_scorer(network, found.sha256, found.verified)
