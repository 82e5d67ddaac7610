"""The scorers of pictures as rewards: the same networks and numbers, with gradient to the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.data.batch import Asked
from fewstep.data.durable import file_sha256
from fewstep.errors import UserError, one_line
from fewstep.eval.scorers.aesthetic import AestheticHead, AestheticScorer
from fewstep.eval.scorers.clip_network import ClipNetwork, CosineScorer, open_model
from fewstep.eval.scorers.clip_score import BACKBONES, OPENAI_L_FILES, Backbone
from fewstep.eval.scorers.clip_shapes import VIT_H_14, VIT_L_14, ClipShape
from fewstep.eval.scorers.clip_tokens import ClipTokens, open_tokenizer
from fewstep.eval.scorers.files import first_found
from fewstep.eval.scorers.pixels import clip_pixels, differentiable_pixels, padded_pixels, transformers_pixels
from fewstep.eval.scorers.table import open_scorer
from fewstep.eval.weights import Found, Weights, load_strictly, read_state

_PATCHES, _OPEN_CLIP = "vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"


class CosineReward:
    """A multiple of the cosine of a picture's and its prompt's features; see :class:`CosineScorer`."""

    def __init__(self, network: ClipNetwork, scale: float, words_before: str = "") -> None:
        self.network, self.scale, self.words_before = network, scale, words_before
        self._padded = network.resize is padded_pixels

    def __call__(self, pictures: Tensor, asked: Asked) -> Tensor:
        """float (B, 1 or 3, H, W) in [0, 1] and their prompts -> (B,), with gradient to the pictures.

        Raises:
            UserError: they have no prompts.
        """
        prompts = [one for one in asked or () if isinstance(one, str)]
        if len(prompts) != len(pictures):
            raise UserError("this reward reads prompts, and the teacher takes none; give another --reward")
        pixels = differentiable_pixels(pictures, self.network.side, padded=self._padded)
        texts = self.network.of_prompts(prompts, self.words_before)
        return self.scale * (self.network.of_pixels(pixels) * texts).sum(1)


class AestheticReward:
    """LAION's predictor of ratings; see :class:`AestheticScorer`. It reads no prompt."""

    def __init__(self, network: ClipNetwork, head: nn.Module) -> None:
        self.network, self.head = network, head

    def __call__(self, pictures: Tensor, asked: Asked = None) -> Tensor:
        """float (B, 1 or 3, H, W) in [0, 1] -> (B,), with gradient to the pictures."""
        pixels = differentiable_pixels(pictures, self.network.side)
        score: Tensor = self.head(self.network.of_pixels(pixels))
        return score


def open_known_reward(
    name: str, weights: Weights, device: torch.device | str = "cpu"
) -> CosineReward | AestheticReward:
    """The reward of a scorer by its name: aesthetic, clip, hps or pick. Errors as :func:`open_scorer`."""
    scorer = open_scorer(name, weights, device)
    if isinstance(scorer, AestheticScorer):
        return AestheticReward(_frozen(scorer.network), scorer.head)
    assert isinstance(scorer, CosineScorer)  # the others that settings admit
    return CosineReward(_frozen(scorer.network), scorer.scale, scorer.words_before)


def open_reward_file(
    path: Path, weights: Weights, device: torch.device | str = "cpu"
) -> CosineReward | AestheticReward:
    """The reward of a safetensors file of a scorer that is known by the shapes of its tensors; no code is run.

    Args:
        path: PickScore's (in transformers' layout), HPS v2's (in open_clip's), a CLIP backbone's of
            :mod:`fewstep.eval.scorers.clip_score`, or the aesthetic predictor's head. Who names it vouches for it.
        weights: where the vocabulary is looked for, and the head's CLIP ViT-L/14.
        device: of the networks.

    Raises:
        MissingWeightsError: a file that it needs besides is nowhere.
        UserError: it cannot be read, or is of no scorer that is known.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"--reward {path} cannot be read: {one_line(error)}") from error
    group, backbone = known_by(shapes, path)
    found = Found(path, file_sha256(path), verified=False)
    if group == "aesthetic":
        head = load_strictly(AestheticHead(), read_state(found), path).to(device)
        clip = open_model(VIT_L_14, first_found(weights, OPENAI_L_FILES), device)
        return AestheticReward(_frozen(ClipNetwork(clip, None, clip_pixels)), head)
    shape = VIT_H_14 if backbone is None else backbone.shape
    tokens = ClipTokens(open_tokenizer(weights), shape.context, cleaned=group != "pick")
    resize = {"pick": transformers_pixels, "hps": padded_pixels}.get(group, clip_pixels)
    network = _frozen(ClipNetwork(open_model(shape, found, device), tokens, resize))
    if group == "pick":
        return CosineReward(network, float(network.model.logit_scale.double().exp()))
    if backbone is None:
        return CosineReward(network, 100.0)
    return CosineReward(network, backbone.scale, backbone.words_before)


def known_by(shapes: Mapping[str, Sequence[int]], path: Path) -> tuple[str, Backbone | None]:
    """Which scorer tensors of these shapes are of, and which backbone where that is the CLIP score.

    Raises:
        UserError: of none.
    """
    if shapes.keys() == AestheticHead().state_dict().keys():
        return "aesthetic", None
    for name, embedding in ((_PATCHES, "visual_projection.weight"), (_OPEN_CLIP, "visual.proj")):
        if name in shapes and embedding in shapes:
            patches, projection = shapes[name], shapes[embedding]
            size = (patches[0], patches[-1], projection[0 if name == _PATCHES else -1])
            if size == _size(VIT_H_14):
                return ("pick" if name == _PATCHES else "hps"), None
            for backbone in BACKBONES:
                if size == _size(backbone.shape):
                    return "clip", backbone
    raise UserError(f"--reward {path} is of no scorer that is known here: aesthetic, clip, hps or pick")


def _size(shape: ClipShape) -> tuple[int, int, int]:
    return shape.image.width, shape.patch, shape.embedding


def _frozen(network: ClipNetwork) -> ClipNetwork:
    """The same one, without gradients of its weights."""
    network.model.requires_grad_(False)
    return network
