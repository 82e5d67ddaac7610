"""DINOv2: features of a network that never saw labels, for FD-DINOv2, FD-infinity, precision and recall, and diversity.

Oquab et al. 2023 (arXiv 2304.07193) for the network; Stein et al. 2023 (arXiv 2306.04675) for judging generators by it:
its distances rank generators as people do, which Inception's do not. As there, the features are the class token after
the last norm, of images of 224x224 (Pillow's bicubic filter, antialiased, aspect ratio not kept), and the distance is
that of ViT-L/14. Distances of the smaller networks are of another scale and carry another name.

The file may be the authors' own (``dinov2_vitl14_pretrain.pth``) or that of the hub
(``dinov2-large/model.safetensors``). Either is read strictly: same names, same shapes. The table of positions is cut
from 37x37 to 16x16 as the authors' network does it, with scale (16 + 0.1) / 37, so that a place differs by up to 0.2
patches from what transformers' network reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError
from fewstep.eval.extractors.network import NetworkExtractor
from fewstep.eval.extractors.pictures import IMAGENET, resized, standardised
from fewstep.eval.weights import Found, MissingWeightsError, WeightFile, Weights, read_state, refuse_misfits

_SIDE, _PATCH, _TRAINED = 224, 14, 518
_RATIO = 4  # of the MLP's width to the token's


@dataclass(frozen=True)
class Size:
    """One of the published networks: its width and depth, the authors' file, and the hub's."""

    letter: str
    hub: str
    width: int
    layers: int
    heads: int
    sha256: str
    bytes: int | None = None

    @property
    def name(self) -> str:
        """As reports call it: ``dinov2-vit-l/14``."""
        return f"dinov2-vit-{self.letter}/14"

    @property
    def files(self) -> tuple[WeightFile, WeightFile]:
        """The authors' file and the hub's; either will do."""
        stem = f"dinov2_vit{self.letter}14"
        about = f"DINOv2 ViT-{self.letter.upper()}/14"
        source = f"{about}, from dl.fbaipublicfiles.com/dinov2/{stem}"
        hub = WeightFile(f"{self.hub}/model.safetensors", about, hub=f"facebook/{self.hub}")
        return WeightFile(f"{stem}_pretrain.pth", source, self.sha256, self.bytes), hub


#: By the name of the kind of extractor.
SIZES = {
    "large": Size(
        "l",
        "dinov2-large",
        1024,
        24,
        16,
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        1217586395,
    ),
    "base": Size("b", "dinov2-base", 768, 12, 12, "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "small": Size("s", "dinov2-small", 384, 12, 6, "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
}


class Dinov2Extractor(NetworkExtractor):
    """The class token of DINOv2: 1024 features of ViT-L/14, 768 of ViT-B/14, 384 of ViT-S/14.

    Args:
        weights: where its file is looked for.
        device: of the network.
        size: ``large``, ``base`` or ``small``.
        batch_size: images in one call of the network.

    Raises:
        MissingWeightsError: its file is nowhere.
        UserError: it is another file than was published, or holds another network.
    """

    def __init__(
        self, weights: Weights, device: torch.device | str = "cpu", size: str = "large", batch_size: int = 50
    ) -> None:
        self._size = SIZES[size]
        found = _either(weights, *self._size.files)
        resize = f"Pillow's bicubic to {_SIDE}x{_SIDE}, antialiased"
        super().__init__(found, self._size.name, resize, device, batch_size)

    def _open(self) -> Any:
        return open_network(self._size, read_state(self._found), self._found).to(self.device)

    def _features(self, images: Tensor) -> Tensor:
        tokens = self._network(standardised(resized(images, _SIDE).to(self.device), IMAGENET)).last_hidden_state
        return tokens[:, 0].float().cpu()


def open_network(size: Size, state: Mapping[str, Tensor], found: Found) -> Any:
    """transformers' Dinov2Model for images of 224x224, with the weights of either file.

    Raises:
        UserError: names or shapes are not those of this size, or this version of transformers knows them no longer.
    """
    from transformers import Dinov2Config, Dinov2Model

    state = _in_the_hubs_names(state)
    refuse_misfits(state, _layout(size), found.path, size.name)
    state["embeddings.position_embeddings"] = positions(state["embeddings.position_embeddings"], _SIDE // _PATCH)
    config = Dinov2Config(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        mlp_ratio=_RATIO,
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    network, loading = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, dtype=torch.float32
    )
    wrong = [name for names in loading.values() for name in names]
    if wrong:
        raise UserError(f"this version of transformers cannot take {size.name}: {sorted(map(str, wrong))[:3]}")
    return network.eval().requires_grad_(False)


def positions(table: Tensor, side: int) -> Tensor:
    """A table of positions (1, 1 + n², d) -> (1, 1 + side², d): the class token's as it is, the patches' interpolated.

    Bicubic, with the scale (side + 0.1) / n of the authors' network: the 0.1 guards their size against rounding.
    """
    width = table.shape[-1]
    trained = round((table.shape[1] - 1) ** 0.5)
    if trained == side:
        return table
    grid = table[:, 1:].float().view(1, trained, trained, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / trained, mode="bicubic")
    return torch.cat([table[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, side * side, width)], dim=1)


def _either(weights: Weights, first: WeightFile, second: WeightFile) -> Found:
    """The first file where it is there, else the second."""
    try:
        return weights.find(first)
    except MissingWeightsError as error:
        try:
            return weights.find(second)
        except MissingWeightsError:
            raise MissingWeightsError(f"{error}; or {second.name} of the hub's {second.hub}") from None


#: The authors' names of parameters and the hub's, which every version of transformers reads.
_NAMES = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
)


def _in_the_hubs_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names as the hub's, queries, keys and values apart; names that are unknown stay as they are."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        before, joined, kind = name.partition(".attn.qkv.")
        if joined and len(tensor) % 3 == 0:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            renamed |= {f"{before}.attention.attention.{part}.{kind}": value for part, value in parts}
        else:
            renamed[name] = tensor
    return renamed


def _layout(size: Size) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by the hub's name."""
    width, inner, grid = size.width, _RATIO * size.width, _TRAINED // _PATCH
    layer = {
        **{f"norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")},
        **{f"layer_scale{i}.lambda1": (width,) for i in (1, 2)},
        **{f"attention.attention.{part}.weight": (width, width) for part in ("query", "key", "value")},
        **{f"attention.attention.{part}.bias": (width,) for part in ("query", "key", "value")},
        "attention.output.dense.weight": (width, width),
        "attention.output.dense.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
    }
    return {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, 1 + grid * grid, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, _PATCH, _PATCH),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        **{f"encoder.layer.{i}.{name}": shape for i in range(size.layers) for name, shape in layer.items()},
    }
