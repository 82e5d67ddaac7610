"""What an image metric sees: feature extractors, and the reference their features are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

# ITU-R BT.601 luma. The weights sum to one, so a grey picture in three channels comes back as it was.
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Features:
    """features: float (N, d). logits: float (N, classes), or None when the extractor does not classify."""

    features: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """Images -> features. What it is called, of which weights it is and how it resizes travels with every number.

    verified: whether sha256, the hash of the weights, is a published one.
    """

    name: str
    sha256: str
    verified: bool
    resize: str

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether images of this shape (C, H, W) can be judged at all."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """uint8 (N, C, H, W) -> features on the CPU."""
        ...


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, as an extractor sees it: real images, or the teacher's own samples.

    features: (n, d), or None where statistics are all there is; labels: int64 (n,), or None where unknown.
    mean: float64 (d,); covariance: float64 (d, d); count: n.
    metric: what a Fréchet distance to it is called. floors: what other samples of the same kind score in that distance
    (held-back real images, real images after the autoencoder), by name; the first is the floor.
    """

    name: str
    metric: str
    extractor_sha256: str
    features: Tensor | None
    labels: Tensor | None
    mean: Tensor
    covariance: Tensor
    count: int
    floors: Mapping[str, float] = field(default_factory=dict)


def to_grey(images: Tensor) -> Tensor:
    """uint8 (N, 1 or 3, H, W) -> float32 (N, 1, H, W) in [0, 1]; colour becomes luma."""
    scaled = images.float() / 255
    if images.shape[1] == 1:
        return scaled
    weights = torch.tensor(LUMA, device=images.device).view(1, 3, 1, 1)
    return (scaled * weights).sum(1, keepdim=True)


class FashionExtractor:
    """The embedded classifier: 64 features and 10 class logits of 32x32 pictures."""

    name = "fashion-classifier-64"
    verified = True
    resize = "none (32x32)"

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 500) -> None:
        # Inside, so that the other extractors and the tests do not need the embedded data.
        from fewstep import fashion

        self.sha256: str = fashion.reference().classifier_sha256
        self.device = torch.device(device)
        self.batch_size = batch_size
        # Channels last takes 0.6 times as long on a CPU.
        self._classifier: Any = fashion.load_classifier(self.device).to(memory_format=torch.channels_last)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """32x32, grey or RGB."""
        return len(shape) == 3 and shape[0] in (1, 3) and tuple(shape[1:]) == (32, 32)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (N, 1 or 3, 32, 32) -> features (N, 64), logits (N, 10), float32 on the CPU."""
        parts = [self._classifier(to_grey(part.to(self.device))) for part in images.split(self.batch_size)]
        features, logits = (torch.cat([part[i].float().cpu() for part in parts]) for i in (0, 1))
        return Features(features, logits)


def fashion_reference() -> Reference:
    """The 10,000 test images of Fashion-MNIST as `FashionExtractor` sees them, with the stated floors."""
    from fewstep import fashion

    stored = fashion.reference()
    names = {"real": "5,000 held-back real images", "autoencoder": "the same through the teachers' autoencoder"}
    features = torch.as_tensor(stored.features).float()
    return Reference(
        name="the 10,000 test images of Fashion-MNIST",
        metric="FD-fashion",
        extractor_sha256=stored.classifier_sha256,
        features=features,
        labels=torch.as_tensor(stored.labels).long(),
        mean=torch.as_tensor(stored.mean, dtype=torch.float64),
        covariance=torch.as_tensor(stored.covariance, dtype=torch.float64),
        count=len(features),
        floors={names[name]: stored.floors[name] for name in names},
    )
