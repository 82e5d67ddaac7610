"""CLIP's view of an image, for CMMD: the embedding of ViT-L/14 at 336x336, of length one.

Radford et al. 2021 (arXiv 2103.00020) for the network; Jayasumana et al. 2024 (arXiv 2401.09603) for judging generators
by it. Images are cut to the square in their middle and resized by Pillow's bicubic filter, antialiased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.eval.extractors.network import NetworkExtractor
from fewstep.eval.extractors.pictures import CLIP, centre_square, resized, standardised
from fewstep.eval.weights import WeightFile, Weights, load_strictly, read_state

_SIDE, _WIDTH = 336, 1024
#: Features of an image.
FEATURES = 768
FILE = WeightFile(
    "clip-vit-large-patch14-336/pytorch_model.bin",
    "CLIP ViT-L/14 at 336x336",
    sha256="c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    size=1_711_974_081,
    hub="openai/clip-vit-large-patch14-336",
)


class ClipImageExtractor(NetworkExtractor):
    """768 features of CLIP ViT-L/14 at 336x336, of Euclidean length one.

    Args:
        weights: where its file is looked for.
        device: of the network.
        batch_size: images in one call of the network.

    Raises:
        MissingWeightsError: its file is nowhere.
        UserError: it is another file than was published, or holds another network.
    """

    def __init__(self, weights: Weights, device: torch.device | str = "cpu", batch_size: int = 50) -> None:
        resize = f"the square in the middle, Pillow's bicubic to {_SIDE}x{_SIDE}, antialiased"
        super().__init__(weights.find(FILE), "clip-vit-l/14-336", resize, device, batch_size)

    def _open(self) -> Any:
        state = read_state(self._found)
        # The file has the tower of texts, too, and numbers of positions that every network makes for itself.
        of_images = {
            name: tensor
            for name, tensor in state.items()
            if name.startswith(("vision_model.", "visual_projection.")) and not name.endswith(".position_ids")
        }
        return load_strictly(_empty(), of_images, self._found.path).to(self.device)

    def _features(self, images: Tensor) -> Tensor:
        pictures = standardised(resized(centre_square(images), _SIDE).to(self.device), CLIP)
        embedded = self._network(pixel_values=pictures).image_embeds.float()
        return torch.nn.functional.normalize(embedded, dim=1).cpu()


def _empty() -> Any:
    """CLIP's tower of images with its projection, its parameters without storage."""
    from accelerate import init_empty_weights
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=4 * _WIDTH,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=_SIDE,
        patch_size=14,
        projection_dim=FEATURES,
        hidden_act="quick_gelu",
    )
    with init_empty_weights():
        return CLIPVisionModelWithProjection(config)
