"""The network of the Fréchet Inception distance, under the three resizes by which published distances differ.

Heusel et al. 2017 (arXiv 1706.08500) for the distance; Parmar et al. 2022 (arXiv 2104.11222) for what the resizes do to
it, and for their names:

- ``clean``: Pillow's bicubic filter with antialias, each channel in floating point. Papers on COCO and clean-fid's
  tables.
- ``legacy_tensorflow``: bilinear without antialias, inside the network. Papers on ImageNet and CIFAR-10: ADM, EDM,
  consistency models, and what follows them.
- ``legacy_pytorch``: torch's bilinear without antialias, and the weights of pytorch-fid.

Numbers of two resizes are never compared. The word FID belongs to the file with the published hash alone
(:func:`fewstep.eval.extractors.kinds.frechet_name`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError, one_line
from fewstep.eval.extractors.inception_network import SIDE, WIDTH, InceptionNetwork
from fewstep.eval.extractors.network import NetworkExtractor
from fewstep.eval.extractors.pictures import resized_in_float
from fewstep.eval.weights import WeightFile, Weights, load_strictly, read_state

#: TorchScript, by NVIDIA, of the network that TensorFlow published on 2015-12-05.
TORCHSCRIPT = WeightFile(
    "inception-2015-12-05.pt",
    "the Inception network of FID, from nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    size=95_607_719,
)
#: The same network in torchvision's names, of pytorch-fid's release fid_weights.
STATE = WeightFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "the Inception network of pytorch-fid, from github.com/mseitzer/pytorch-fid/releases/tag/fid_weights",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
)
_RESIZES = {
    "clean": f"clean: Pillow's bicubic to {SIDE}x{SIDE}, antialiased, in floating point",
    "legacy_tensorflow": f"legacy_tensorflow: bilinear to {SIDE}x{SIDE} inside the network, no antialias",
    "legacy_pytorch": f"legacy_pytorch: torch's bilinear to {SIDE}x{SIDE}, no antialias",
}


class InceptionExtractor(NetworkExtractor):
    """2048 features of the last average of the network of FID.

    Args:
        weights: where its file is looked for.
        device: of the network.
        mode: ``clean``, ``legacy_tensorflow`` or ``legacy_pytorch``.
        batch_size: images in one call of the network.

    Raises:
        MissingWeightsError: its file is nowhere.
        UserError: it is another file than was published, or holds another network.
        ValueError: an unknown mode.
    """

    def __init__(
        self, weights: Weights, device: torch.device | str = "cpu", mode: str = "clean", batch_size: int = 50
    ) -> None:
        if mode not in _RESIZES:
            raise ValueError(f"the resize must be one of {', '.join(_RESIZES)}, not {mode!r}")
        file = STATE if mode == "legacy_pytorch" else TORCHSCRIPT
        name = "inception-2015-12-05" + ("-pytorch" if file is STATE else "")
        super().__init__(weights.find(file), name, _RESIZES[mode], device, batch_size)
        self._mode = mode

    def _open(self) -> Any:
        if self._mode == "legacy_pytorch":
            from accelerate import init_empty_weights

            with init_empty_weights():
                network = InceptionNetwork()
            return load_strictly(network, read_state(self._found), self._found.path).to(self.device)
        try:
            network = torch.jit.load(self._found.path, map_location=self.device).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self._found.path} is no TorchScript: {one_line(error)[:200]}") from error
        if not hasattr(network, "layers"):
            raise UserError(f"{self._found.path} is another network: its layers have no such name")
        return network

    def _features(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> float32 (n, 2048)."""
        if self._mode == "clean":
            # The constants of the network's own first layer, which comes after its resize.
            found = self._network.layers((resized_in_float(images, SIDE).to(self.device) - 128) / 128)
        elif self._mode == "legacy_tensorflow":
            found = self._network(images.to(self.device).float(), return_features=True)
        else:
            sized = F.interpolate(images.to(self.device).float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
            found = self._network(2 * (sized.clamp(0, 255) / 255) - 1)
        found = found.flatten(1).float().cpu()
        if found.shape != (len(images), WIDTH):
            raise UserError(f"{self._found.path} is another network: it gives {found.shape[1]} features, not {WIDTH}")
        return found
