"""A CLIP network of transformers with published weights, and its two features of unit length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fewstep.eval.scorers.clip_shapes import ClipShape, as_transformers
from fewstep.eval.scorers.clip_tokens import ClipTokens
from fewstep.eval.scorers.files import read_clip
from fewstep.eval.scorers.pixels import Resize, normalised
from fewstep.eval.scorers.scorer import Asked, each_sample, paired
from fewstep.eval.weights import Found, load_strictly


class ClipNetwork:
    """Cosines between pictures and prompts, and features of pictures, in float32.

    model: transformers' ``CLIPModel``, or one of its shape. tokens: of prompts; None where only pictures are looked at.
    resize: how pictures come to the network's size.
    """

    def __init__(self, model: Any, tokens: ClipTokens | None, resize: Resize, batch_size: int = 32) -> None:
        self.model, self.tokens, self.resize, self.batch_size = model, tokens, resize, batch_size
        self.side: int = model.config.vision_config.image_size

    @torch.no_grad()
    def of_pictures(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 1 or 3, H, W) -> features of length 1, float32 (N, d), on the network's device."""
        return self.of_pixels(self.resize(pictures.to(self.model.device), self.side))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """The same of pictures that have the network's size already, float32 (N, 3, side, side), with gradient."""
        return normalize(_features(self.model.get_image_features(pixel_values=normalised(pixels))), dim=1)

    @torch.no_grad()
    def of_prompts(self, prompts: Sequence[str], words_before: str = "") -> Tensor:
        """Features of length 1, float32 (N, d), on the network's device."""
        if self.tokens is None:
            raise ValueError("this network was opened without its tokenizer")
        parts = self.tokens(prompts, words_before).to(self.model.device).split(self.batch_size)
        return torch.cat([normalize(_features(self.model.get_text_features(input_ids=part)), dim=1) for part in parts])

    def cosines(self, images: Tensor, asked: Asked, name: str, words_before: str = "") -> Tensor:
        """The cosine of each sample with its prompt, the mean over the frames of a video; float64 (N,), on the CPU.

        Args:
            images: uint8 (N, [F,] 1 or 3, H, W). asked: a prompt each. name: of the scorer, for errors.

        Raises:
            ValueError: there are no prompts, or not one for each sample.
        """
        prompts = paired(images, asked, name)
        if len(prompts) == 0:
            return torch.empty(0, dtype=torch.float64)
        # Each prompt is read once, however many samples it has.
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        texts = self.of_prompts(list(rows), words_before)
        of_sample = torch.tensor([rows[prompt] for prompt in prompts])

        def score(pictures: Tensor, samples: Tensor) -> Tensor:
            return (self.of_pictures(pictures) * texts[of_sample[samples].to(texts.device)]).sum(dim=1)

        return each_sample(images, score, self.batch_size)


@dataclass
class CosineScorer:
    """A number that is a multiple of the cosine of a picture's and its prompt's features.

    name, names, of which there is one, sha256, verified: as of every scorer. words_before: put before every prompt.
    """

    name: str
    names: tuple[str, ...]
    network: ClipNetwork
    scale: float
    sha256: str | None
    verified: bool
    words_before: str = ""
    looks_at: Literal["images", "videos"] = "images"

    def __call__(self, images: Tensor, asked: Asked) -> Mapping[str, Tensor]:
        """uint8 (N, [F,] 1 or 3, H, W) and N prompts -> the number, float64 (N,). ValueError without prompts."""
        (number,) = self.names
        return {number: self.scale * self.network.cosines(images, asked, number, self.words_before)}

    def note(self) -> str | None:
        return self.network.tokens.note() if self.network.tokens is not None else None


def open_model(shape: ClipShape, found: Found, device: torch.device | str) -> nn.Module:
    """transformers' ``CLIPModel`` with the weights of a file in float32: OpenAI's, open_clip's or transformers' names.

    Raises:
        UserError: the file cannot be read, or its names and shapes are not exactly those of this network.
    """
    from transformers import CLIPModel

    # Without storage: random weights of a billion parameters take longer to draw than real ones to read.
    with torch.device("meta"):
        model = CLIPModel(shape.config())
    load_strictly(model, as_transformers(read_clip(found)), found.path)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_ids.shape[-1]  # no parameter, and so in no file
        embeddings.position_ids = torch.arange(count)[None]
    return model.to(device)


def _features(answer: Any) -> Tensor:
    """The projected features: transformers gives a tensor before version 5, and an object that holds them since."""
    features: Tensor = answer if isinstance(answer, Tensor) else answer.pooler_output
    return features.float()
