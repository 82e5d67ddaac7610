"""Rewards of pictures of the embedded teachers: a small one to train against, and one to see what that does besides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import UserError
from fewstep.fashion import load_classifier, training_images
from fewstep.fashion.prompts import PROMPTS

_SHARED = 1e-2  # of the mean variance, added to every variance: what the pictures' own noise is
_SIDE = 16


class ClassProbability:
    """The probability of the prompt's class by the embedded classifier, in [0, 1].

    A student that is rewarded by it has seen its judge: ``fd_test`` and ``agreement``, of the same network, say nothing
    of it any more.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.classifier = load_classifier(device)

    def __call__(self, pictures: Tensor, asked: Sequence[str] | Sequence[int] | None) -> Tensor:
        """Pictures (B, 1 or 3, 32, 32) in [0, 1] and their prompts or labels -> (B,), with gradient.

        Raises:
            UserError: they were asked for something else.
        """
        labels = torch.tensor(classes(asked), device=pictures.device)
        _, logits = self.classifier(grey(pictures).clamp(0, 1))
        return F.softmax(logits, 1).gather(1, labels[:, None])[:, 0]


class ClassLikelihood:
    """How likely a picture is among real ones of its class: a Gaussian of each class, no network at all.

        -1/2 (x - m_c)^T S_c^-1 (x - m_c) / d

    of 16x16 pixels (d = 256), m and S of the embedded training images, S with a hundredth of its mean variance added.
    About -1/2 of real pictures, lower of others; alike samples may have more.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        images, labels = training_images()
        small = _small(images.float() / 255)
        means, roots = [], []
        for label in range(len(PROMPTS)):
            some = small[labels == label].double()
            covariance = torch.cov(some.T)
            covariance += _SHARED * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
            means.append(some.mean(0))
            roots.append(torch.linalg.inv(torch.linalg.cholesky(covariance)))
        self.means, self.roots = torch.stack(means).float().to(device), torch.stack(roots).float().to(device)

    def __call__(self, pictures: Tensor, asked: Sequence[str] | Sequence[int] | None) -> Tensor:
        """Pictures (B, 1 or 3, 32, 32) in [0, 1] and their prompts or labels -> (B,), with gradient.

        Raises:
            UserError: they were asked for something else.
        """
        labels = classes(asked)
        offset = _small(grey(pictures)) - self.means[labels]
        return -(self.roots[labels] @ offset[:, :, None]).square().mean((1, 2)) / 2


def classes(asked: Sequence[str] | Sequence[int] | None) -> list[int]:
    """The classes, 0 to 9, of prompts of the embedded teachers or of labels.

    Raises:
        UserError: there are none, or others.
    """
    known = [PROMPTS.index(one) if isinstance(one, str) and one in PROMPTS else one for one in asked or ()]
    if not known or not all(isinstance(one, int) and 0 <= one < len(PROMPTS) for one in known):
        raise UserError("this reward knows the ten prompts of fewstep.fashion.PROMPTS, or labels 0-9, and nothing else")
    return [int(one) for one in known]


def grey(pictures: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> float32 (B, 1, H, W), the mean over the channels."""
    return pictures.float().mean(1, keepdim=True)


def _small(pictures: Tensor) -> Tensor:
    """(B, 1, 32, 32) -> (B, 256)."""
    return F.adaptive_avg_pool2d(pictures, _SIDE).flatten(1)
