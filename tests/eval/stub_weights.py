"""Small stand-ins for the files of published networks, under the published names."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.data.durable import file_sha256
from fewstep.eval.weights import WeightFile, Weights


class StubInception(nn.Module):
    """The interface of NVIDIA's TorchScript: layers of sized images, and a forward that resizes by itself."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.AvgPool2d(23), nn.Flatten(), nn.Linear(3 * 13 * 13, width), nn.ReLU())

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        img = F.interpolate(img, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers((img - 128) / 128) if return_features else img


def inception_folder(folder: Path, network: nn.Module | None = None) -> Path:
    """A folder with a stub of ``inception-2015-12-05.pt``."""
    torch.jit.script(network or StubInception()).save(folder / "inception-2015-12-05.pt")
    return folder


def told(folder: Path, *files: WeightFile) -> Weights:
    """Weights of a folder whose files are vouched for, as by --weights_sha256."""
    return Weights(folder, {file.name: file_sha256(folder / file.name) for file in files})
