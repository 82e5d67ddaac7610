"""Inception-v3 as the Fréchet Inception distance knows it, for weights that lie in a file without their network.

Szegedy et al. 2015 (arXiv 1512.00567), with the three habits of TensorFlow's network of 2015-12-05, on which published
distances rest: averages leave the padding out, the last block takes a maximum where the paper takes an average, and
there are 1008 classes. Names of parameters are those of torchvision's Inception3, in which the weights were published.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Features of the last average, and the side of the square images that the network was trained on.
WIDTH, SIDE = 2048, 299
_CLASSES = 1008


class Convolution(NamedTuple):
    """One convolution of a block: what it reads (``x``, a pooled x, or another's name), channels, kernel, stride."""

    source: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU; "same" padding unless it halves the picture."""

    def __init__(self, inputs: int, channels: int, kernel: tuple[int, int], stride: int = 1, same: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inputs, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, channels, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Convolutions that read each other, in order; what ``outputs`` names is joined along the channels."""

    def __init__(self, inputs: int, convolutions: dict[str, Convolution], outputs: tuple[str, ...]) -> None:
        super().__init__()
        widths = {"x": inputs, "average": inputs, "maximum": inputs, "halved": inputs}
        self.sources = {name: convolution.source for name, convolution in convolutions.items()}
        self.outputs = outputs
        for name, (source, channels, kernel, stride) in convolutions.items():
            self.add_module(name, Unit(widths[source], channels, kernel, stride, same=stride == 1))
            widths[name] = channels
        self.width = sum(widths[name] for name in outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, width, H', W')."""
        values = {"x": x}
        for name in (*self.sources.values(), *self.outputs):
            if name in _POOLS and name not in values:
                values[name] = _POOLS[name](x)
        for name, source in self.sources.items():
            values[name] = self.get_submodule(name)(values[source])
        return torch.cat([values[name] for name in self.outputs], dim=1)


_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halved": lambda x: F.max_pool2d(x, 3, stride=2),
}


def _block_a(inputs: int, pooled: int) -> Block:
    convolutions = {
        "branch1x1": Convolution("x", 64),
        "branch5x5_1": Convolution("x", 48),
        "branch5x5_2": Convolution("branch5x5_1", 64, (5, 5)),
        "branch3x3dbl_1": Convolution("x", 64),
        "branch3x3dbl_2": Convolution("branch3x3dbl_1", 96, (3, 3)),
        "branch3x3dbl_3": Convolution("branch3x3dbl_2", 96, (3, 3)),
        "branch_pool": Convolution("average", pooled),
    }
    return Block(inputs, convolutions, ("branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"))


def _block_b(inputs: int) -> Block:
    convolutions = {
        "branch3x3": Convolution("x", 384, (3, 3), 2),
        "branch3x3dbl_1": Convolution("x", 64),
        "branch3x3dbl_2": Convolution("branch3x3dbl_1", 96, (3, 3)),
        "branch3x3dbl_3": Convolution("branch3x3dbl_2", 96, (3, 3), 2),
    }
    return Block(inputs, convolutions, ("branch3x3", "branch3x3dbl_3", "halved"))


def _block_c(inputs: int, inner: int) -> Block:
    convolutions = {
        "branch1x1": Convolution("x", 192),
        "branch7x7_1": Convolution("x", inner),
        "branch7x7_2": Convolution("branch7x7_1", inner, (1, 7)),
        "branch7x7_3": Convolution("branch7x7_2", 192, (7, 1)),
        "branch7x7dbl_1": Convolution("x", inner),
        "branch7x7dbl_2": Convolution("branch7x7dbl_1", inner, (7, 1)),
        "branch7x7dbl_3": Convolution("branch7x7dbl_2", inner, (1, 7)),
        "branch7x7dbl_4": Convolution("branch7x7dbl_3", inner, (7, 1)),
        "branch7x7dbl_5": Convolution("branch7x7dbl_4", 192, (1, 7)),
        "branch_pool": Convolution("average", 192),
    }
    return Block(inputs, convolutions, ("branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"))


def _block_d(inputs: int) -> Block:
    convolutions = {
        "branch3x3_1": Convolution("x", 192),
        "branch3x3_2": Convolution("branch3x3_1", 320, (3, 3), 2),
        "branch7x7x3_1": Convolution("x", 192),
        "branch7x7x3_2": Convolution("branch7x7x3_1", 192, (1, 7)),
        "branch7x7x3_3": Convolution("branch7x7x3_2", 192, (7, 1)),
        "branch7x7x3_4": Convolution("branch7x7x3_3", 192, (3, 3), 2),
    }
    return Block(inputs, convolutions, ("branch3x3_2", "branch7x7x3_4", "halved"))


def _block_e(inputs: int, pool: str) -> Block:
    convolutions = {
        "branch1x1": Convolution("x", 320),
        "branch3x3_1": Convolution("x", 384),
        "branch3x3_2a": Convolution("branch3x3_1", 384, (1, 3)),
        "branch3x3_2b": Convolution("branch3x3_1", 384, (3, 1)),
        "branch3x3dbl_1": Convolution("x", 448),
        "branch3x3dbl_2": Convolution("branch3x3dbl_1", 384, (3, 3)),
        "branch3x3dbl_3a": Convolution("branch3x3dbl_2", 384, (1, 3)),
        "branch3x3dbl_3b": Convolution("branch3x3dbl_2", 384, (3, 1)),
        "branch_pool": Convolution(pool, 192),
    }
    ends = ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b")
    return Block(inputs, convolutions, ("branch1x1", *ends, "branch_pool"))


class InceptionNetwork(nn.Module):
    """Images (N, 3, 299, 299) in [-1, 1] -> features (N, 2048) of the last average."""

    def __init__(self) -> None:
        super().__init__()
        stem = {
            "Conv2d_1a_3x3": Unit(3, 32, (3, 3), 2, same=False),
            "Conv2d_2a_3x3": Unit(32, 32, (3, 3), same=False),
            "Conv2d_2b_3x3": Unit(32, 64, (3, 3)),
            "maxpool1": nn.MaxPool2d(3, 2),
            "Conv2d_3b_1x1": Unit(64, 80, (1, 1)),
            "Conv2d_4a_3x3": Unit(80, 192, (3, 3), same=False),
            "maxpool2": nn.MaxPool2d(3, 2),
        }
        mixed = {
            "Mixed_5b": _block_a(192, 32),
            "Mixed_5c": _block_a(256, 64),
            "Mixed_5d": _block_a(288, 64),
            "Mixed_6a": _block_b(288),
            "Mixed_6b": _block_c(768, 128),
            "Mixed_6c": _block_c(768, 160),
            "Mixed_6d": _block_c(768, 160),
            "Mixed_6e": _block_c(768, 192),
            "Mixed_7a": _block_d(768),
            "Mixed_7b": _block_e(1280, "average"),
            "Mixed_7c": _block_e(WIDTH, "maximum"),
        }
        self.order = (*stem, *mixed)
        for name, part in {**stem, **mixed}.items():
            self.add_module(name, part)
        # Not called: it is in the file, and a file that fits has it.
        self.fc = nn.Linear(WIDTH, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 2048)."""
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))
