"""The metric's network: a small classifier of Fashion-MNIST whose 64 features the Fréchet distance compares."""

import torch
from torch import Tensor, nn

FEATURES = 64
CLASSES = 10


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    ]


class FashionClassifier(nn.Module):
    """Six 3x3 convolutions (32, 64, 128 channels at 32x32, 16x16, 8x8), mean over space, 64 features, 10 logits.

    No distillation method may see these weights or their gradients: they are the judge. A run that names it by
    ``--reward`` (:class:`fewstep.fashion.rewards.ClassProbability`) is judged by something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            *_convolution(64, 128),
            *_convolution(128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            # Normalized before the rectifier, so that none of the features dies.
            nn.Linear(128, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of grey images.

        Args:
            images: float, (B, 1, 32, 32), in [0, 1].

        Returns:
            features (B, 64), non-negative, and logits (B, 10).

        Raises:
            ValueError: for another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
            raise ValueError(f"expected images of shape (B, 1, 32, 32), got {tuple(images.shape)}")
        features = self.trunk(images * 2 - 1).float()
        return features, self.head(features)


@torch.inference_mode()
def extract(classifier: FashionClassifier, images: Tensor, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Features (N, 64) and logits (N, 10) on the CPU, in batches.

    Args:
        classifier: in eval mode, on any device.
        images: uint8 (0..255) or float in [0, 1], (N, 1, 32, 32).
    """
    device = next(classifier.parameters()).device
    features, logits = [], []
    for batch in images.split(batch_size):
        batch = batch.to(device)
        batch = batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()
        batch_features, batch_logits = classifier(batch)
        features.append(batch_features.float().cpu())
        logits.append(batch_logits.float().cpu())
    return torch.cat(features), torch.cat(logits)
