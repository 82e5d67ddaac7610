"""Features of the images that samples show, on frozen networks that see pixels, with gradient to the samples.

The network is given (SAM, DINOv2, CLIP: any vision network of transformers), or there is a stand-in for it: the encoder
of the teacher's own autoencoder, and where a teacher has none of the usual form, convolutions that were drawn once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.draws import keyed_generator
from fewstep.errors import UserError, one_line
from fewstep.networks.features import lists_of_blocks
from fewstep.networks.perceptual import images_of
from fewstep.reading import read_json
from fewstep.recording import Recording
from fewstep.recording.pipeline import evaluating
from fewstep.recording.watch.hooks import hooked

#: From images (B, C, H, W) in [0, 1] to maps (B, C', H', W') or tokens (B, N, C'), from the first level to the last.
Extract = Callable[[Tensor], list[Tensor]]
#: Levels of a given network, at even depths.
LEVELS = 4
# Mean and deviation of ImageNet's channels, which a network without a file of its own is taken to expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFeatures:
    """Features of x0 by levels.

    Args:
        extract: from images.
        images: from x0 (B, ...) to images (B, C, H, W), [0, 1] where they are within the pipeline's range.
        about: what extracts them, in words.
    """

    def __init__(self, extract: Extract, images: Callable[[Tensor], Tensor], about: str) -> None:
        self.extract, self.images, self.about = extract, images, about

    def __call__(self, x0: Tensor) -> list[Tensor]:
        """Maps or tokens of what ``x0`` (B, ...) shows, float32 or wider."""
        return [f.float() if f.dtype.itemsize < 4 else f for f in self.extract(self.images(x0))]


def image_features_of(recording: Recording, extractor: str | None, device: torch.device | str) -> ImageFeatures:
    """Features of what a teacher's samples show, by a given network or a stand-in.

    Args:
        recording: of the teacher.
        extractor: a folder of a vision network in transformers' form, or a hub id that was fetched before; None for the
            stand-in.
        device: of the features' network.

    Raises:
        UserError: the network cannot be had, or :func:`fewstep.networks.perceptual.images_of` refuses.
    """
    images = images_of(recording, "the discriminator's heads look at", "give --gan_weight 0")
    if extractor is not None:
        return ImageFeatures(VisionLevels(*open_vision(extractor, device)), images, f"blocks of {extractor}")
    decoder = None if recording.codec.decoder is None else getattr(recording.pipeline, recording.codec.decoder)
    blocks = getattr(getattr(decoder, "encoder", None), "down_blocks", None)
    if blocks:
        about = "the encoder of the teacher's autoencoder, a stand-in"
        return ImageFeatures(EncoderLevels(decoder, recording.codec.centred), images, about)
    channels = images(torch.zeros(1, *recording.sample_shape, device=device)).shape[1]
    return ImageFeatures(DrawnLevels(channels).to(device), images, "convolutions that were drawn once, a stand-in")


class EncoderLevels:
    """What each level of an autoencoder's encoder says.

    Args:
        autoencoder: has an ``encoder`` with ``down_blocks``.
        centred: whether it is shown images in [-1, 1].
    """

    def __init__(self, autoencoder: Any, centred: bool) -> None:
        self.autoencoder, self.centred = autoencoder, centred
        self.blocks = {str(k): block for k, block in enumerate(autoencoder.encoder.down_blocks)}

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps of images (B, C, H, W)."""
        pixels = images * 2 - 1 if self.centred else images
        encoder = self.autoencoder.encoder
        with evaluating(encoder):
            return _outputs(self.blocks, lambda: encoder(pixels.to(next(encoder.parameters()).dtype)))


class DrawnLevels(nn.Module):
    """Convolutions with frozen random weights, always the same ones: three levels, each of half the side.

    Args:
        channels: of the images.
    """

    WIDTHS = (32, 64, 128)

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, *self.WIDTHS)
        generator = keyed_generator("drawn levels", channels)
        levels = [nn.Conv2d(a, b, 4, 2, 1, bias=False) for a, b in pairwise(widths)]
        for weight in (level.weight for level in levels):
            fan_in = weight[0].numel()
            weight.data = torch.randn(weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        self.levels = nn.ModuleList(levels)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of images (B, C, H, W)."""
        x, seen = images * 2 - 1, []
        for level in self.levels:
            x = F.leaky_relu(level(x), 0.2)
            seen.append(x)
        return seen


class VisionLevels:
    """What blocks of a vision network say, at even depths.

    Args:
        network: takes ``pixel_values``.
        side: of the images that it takes, in pixels.
        mean: of its channels.
        std: of its channels.
    """

    def __init__(self, network: nn.Module, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.network, self.side = network, side
        device = next(network.parameters()).device
        self.mean, self.std = (torch.tensor(values, device=device).reshape(1, -1, 1, 1) for values in (mean, std))
        lists = lists_of_blocks(network)
        blocks = list(lists[max(lists, key=lambda name: len(lists[name]))])
        depths = dict.fromkeys(len(blocks) * (k + 1) // LEVELS - 1 for k in range(LEVELS))
        self.blocks = {str(depth): blocks[depth] for depth in depths if depth >= 0}

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Maps or tokens of images (B, C, H, W), of which grey ones are shown as coloured ones."""
        pixels = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        pixels = (pixels.expand(-1, 3, -1, -1) - self.mean) / self.std
        dtype = next(self.network.parameters()).dtype
        seen = _outputs(self.blocks, lambda: self.network(pixel_values=pixels.to(dtype)))
        # SAM's blocks have their channels last: a place is a token.
        width = getattr(getattr(self.network, "config", None), "hidden_size", None)
        return [x.flatten(1, 2) if x.dim() == 4 and x.shape[-1] == width != x.shape[1] else x for x in seen]


def open_vision(name: str, device: torch.device | str) -> tuple[nn.Module, int, list[float], list[float]]:
    """A frozen vision network of transformers, the side of its images, and mean and deviation of their channels.

    Nothing is fetched, only safetensors are read, and no code is run.

    Raises:
        UserError: it is not there, or is no such network.
    """
    from transformers import AutoModel

    try:
        model: Any = AutoModel.from_pretrained(
            name, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--feature_extractor {name} cannot be loaded: {one_line(error)}; it takes a folder with the config.json "
            "and the model.safetensors of a vision network of transformers (SAM, DINOv2, CLIP, ViT)"
        ) from error
    parts = [part for part in ("vision_encoder", "vision_model") if hasattr(model, part)]
    network: Any = getattr(model, parts[0]) if parts else model
    side = getattr(network.config, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    if not isinstance(side, int) or not lists_of_blocks(network):
        raise UserError(
            f"--feature_extractor {name} is a {type(model).__name__}, which says no image size or has no blocks: "
            "give a vision network (SAM, DINOv2, CLIP, ViT)"
        )
    file = Path(name) / "preprocessor_config.json"
    told: Mapping[str, Any] = read_json(file) if file.is_file() else {}
    mean, std = told.get("image_mean", _MEAN), told.get("image_std", _STD)
    return network.eval().requires_grad_(False).to(device), side, list(mean), list(std)


def _outputs(blocks: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """What the blocks said while ``run`` ran, in their order: the first tensor of each."""
    seen: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        seen[name] = output if isinstance(output, Tensor) else output[0]

    with hooked(blocks, after=note):
        run()
    return [seen[name] for name in blocks]
