"""LAION's aesthetic score: how much people would like a picture, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.eval.scorers.clip_network import ClipNetwork, open_model
from fewstep.eval.scorers.clip_score import OPENAI_L_FILES
from fewstep.eval.scorers.clip_shapes import VIT_L_14
from fewstep.eval.scorers.files import first_found
from fewstep.eval.scorers.pixels import clip_pixels
from fewstep.eval.scorers.scorer import Asked, each_sample
from fewstep.eval.weights import WeightFile, Weights, load_strictly, read_state

HEAD = WeightFile(
    "sac+logos+ava1-l14-linearMSE.pth",
    "LAION's aesthetic predictor, from christophschuhmann/improved-aesthetic-predictor on GitHub",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    size=3714759,
)


class AestheticHead(nn.Module):
    """Features of CLIP ViT-L/14 -> one number: five linear layers with nothing but dropout between them.

    Its parameters are ``layers.0`` to ``layers.7``, as in the published file; the dropouts are its gaps.
    """

    def __init__(self, features: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, d) -> (N,)."""
        score: Tensor = self.layers(features)
        return score[:, 0]


class AestheticScorer:
    """LAION's aesthetic predictor v2 on the features of length 1 of OpenAI's CLIP ViT-L/14; about 1 to 10.

    Schuhmann, improved-aesthetic-predictor, whose script runs CLIP in half precision on a GPU; this is float32.
    """

    name = "LAION aesthetic v2 (CLIP ViT-L/14 openai); bicubic to 224, centre"
    names: tuple[str, ...] = ("aesthetic",)
    sha256: str | None
    looks_at: Literal["images", "videos"] = "images"

    def __init__(self, network: ClipNetwork, head: nn.Module, sha256: str, verified: bool) -> None:
        self.network, self.head = network, head
        self.sha256 = sha256
        self.verified = verified

    @torch.no_grad()
    def __call__(self, images: Tensor, asked: Asked = None) -> Mapping[str, Tensor]:
        """uint8 (N, [F,] 1 or 3, H, W) -> ``aesthetic``, float64 (N,)."""
        network, head = self.network, self.head
        return {"aesthetic": each_sample(images, lambda part, _: head(network.of_pictures(part)), network.batch_size)}

    def note(self) -> str | None:
        return None


def open_aesthetic_scorer(weights: Weights, device: torch.device | str = "cpu") -> AestheticScorer:
    """The aesthetic score with its published weights; sha256 is that of the head.

    Errors as :func:`fewstep.eval.scorers.clip_score.open_clip_scorer`.
    """
    head_file, clip_file = weights.find(HEAD), first_found(weights, OPENAI_L_FILES)
    head = load_strictly(AestheticHead(), read_state(head_file), head_file.path).to(device)
    network = ClipNetwork(open_model(VIT_L_14, clip_file, device), None, clip_pixels)
    return AestheticScorer(network, head, head_file.sha256, head_file.verified and clip_file.verified)
