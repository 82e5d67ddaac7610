"""What the extractors of published networks share: a file that is found at once, and a network that is opened late."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.extractors.pictures import as_rgb, takes
from fewstep.eval.features import Features
from fewstep.eval.weights import Found


class NetworkExtractor(ABC):
    """An extractor whose weights lie in a file.

    Args:
        found: the file, which was checked.
        name: of the network.
        resize: how pictures come to its size, in words.
        device: of the network.
        batch_size: images in one call of the network.
    """

    def __init__(self, found: Found, name: str, resize: str, device: torch.device | str, batch_size: int) -> None:
        self.name, self.resize = name, resize
        self.sha256, self.verified = found.sha256, found.verified
        self.device = torch.device(device)
        self._found, self._batch_size = found, batch_size

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Grey or RGB, of any size."""
        return takes(shape)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (N, 1 or 3, H, W) -> features float32 (N, d) on the CPU."""
        parts = [self._features(as_rgb(part)) for part in images.split(self._batch_size)]
        return Features(torch.cat(parts), None)

    @cached_property
    def _network(self) -> Any:
        """Opened with the first images: rows that are kept need none."""
        return self._open()

    @abstractmethod
    def _open(self) -> Any:
        """The network, on the device. Raises UserError where the file holds another one."""

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) -> float32 (n, d) on the CPU."""
