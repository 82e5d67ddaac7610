"""The CLIP score: how well a picture fits its prompt, by the cosine of CLIP's two features."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.errors import UserError
from fewstep.eval.scorers.clip_network import ClipNetwork, CosineScorer, open_model
from fewstep.eval.scorers.clip_shapes import VIT_B_32, VIT_G_14, VIT_L_14, ClipShape
from fewstep.eval.scorers.clip_tokens import ClipTokens, open_tokenizer
from fewstep.eval.scorers.files import first_found
from fewstep.eval.scorers.pixels import Resize, clip_pixels, gigagan_pixels
from fewstep.eval.weights import MissingWeightsError, WeightFile, Weights


@dataclass(frozen=True)
class Backbone:
    """A CLIP network as papers use it for the CLIP score.

    name: that every number carries. files: of its weights, any of which will do. scale: of the cosine. resize: of the
    pictures; recipe: that in words. words_before: put in front of every prompt.
    """

    name: str
    files: tuple[WeightFile, ...]
    shape: ClipShape
    scale: float
    resize: Resize
    recipe: str
    words_before: str = ""


_G_FOLDER = "CLIP-ViT-g-14-laion2B-s12B-b42K"
OPENAI_L_FILES = (
    WeightFile(
        "ViT-L-14.pt",
        "OpenAI's CLIP ViT-L/14",
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    WeightFile(
        "clip-vit-large-patch14/model.safetensors",
        "OpenAI's CLIP ViT-L/14",
        sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        size=1710540580,
        hub="openai/clip-vit-large-patch14",
    ),
)

#: In the order in which they are looked for. The scale is that of the tables in which each network is common.
BACKBONES = (
    Backbone(
        name="ViT-g-14 laion2b_s12b_b42k",
        files=tuple(
            WeightFile(f"{_G_FOLDER}/{file}", "LAION's CLIP ViT-g-14", hub=f"laion/{_G_FOLDER}")
            for file in ("open_clip_pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors")
        ),
        shape=VIT_G_14,
        scale=1.0,
        resize=gigagan_pixels,
        recipe="centre square, Lanczos to 256, bicubic to 224; 'A photo depicts' before the prompt (GigaGAN, DMD2)",
        words_before="A photo depicts ",
    ),
    Backbone(
        name="ViT-L/14 openai",
        files=OPENAI_L_FILES,
        shape=VIT_L_14,
        scale=100.0,
        resize=clip_pixels,
        recipe="bicubic to 224, centre",
    ),
    Backbone(
        name="ViT-B/32 openai",
        files=(
            WeightFile(
                "ViT-B-32.pt",
                "OpenAI's CLIP ViT-B/32",
                sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            ),
            WeightFile(
                "clip-vit-base-patch32/pytorch_model.bin",
                "OpenAI's CLIP ViT-B/32",
                sha256="a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
                size=605247071,
                hub="openai/clip-vit-base-patch32",
            ),
        ),
        shape=VIT_B_32,
        scale=100.0,
        resize=clip_pixels,
        recipe="bicubic to 224, centre",
    ),
)


def clip_scorer(network: ClipNetwork, backbone: Backbone, sha256: str, verified: bool) -> CosineScorer:
    """The CLIP score: the cosine of a picture's and its prompt's features, times the scale that is common for it.

    Hessel et al. 2021 (arXiv 2104.08718) without their factor 2.5 and without the clamp at 0. Numbers of different
    backbones cannot be compared: about 0.33 with ViT-g-14 is about 31 with 100 x ViT-B/32.
    """
    scale = "cosine" if backbone.scale == 1 else f"{backbone.scale:.0f} x cosine"
    name = f"CLIP {backbone.name}, {scale}; {backbone.recipe}"
    return CosineScorer(name, ("clip",), network, backbone.scale, sha256, verified, backbone.words_before)


def open_clip_scorer(weights: Weights, device: torch.device | str = "cpu", backbone: str | None = None) -> CosineScorer:
    """The CLIP score by the backbone of this name, or by the first of ``BACKBONES`` whose weights are there.

    Raises:
        MissingWeightsError: they are not there, or the tokenizer's file is not.
        UserError: a file is not what was published, or there is no backbone of this name.
    """
    wanted = [one for one in BACKBONES if backbone in (None, one.name)]
    if not wanted:
        raise UserError(f"no CLIP backbone is called {backbone!r}: {', '.join(one.name for one in BACKBONES)}")
    missing: list[str] = []
    for one in wanted:
        try:
            found = first_found(weights, one.files)
        except MissingWeightsError as error:
            missing.append(str(error))
            continue
        tokens = ClipTokens(open_tokenizer(weights), one.shape.context, cleaned=True)
        network = ClipNetwork(open_model(one.shape, found, device), tokens, one.resize)
        return clip_scorer(network, one, found.sha256, found.verified)
    others = ", ".join(f"{one.name} ({one.files[0].name})" for one in wanted[1:])
    raise MissingWeightsError(missing[0] + (f"; other backbones: {others}" if others else ""))
