"""Motion of each video, to be read beside the teacher's: few-step students are prone to stand still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fewstep.eval.features import Extractor
from fewstep.eval.scorers.scorer import Asked, frames_of

_AT_ONCE = 8  # videos: bounds the memory, changes no number


class MotionScorer:
    """How much changes from one frame to the next, without an estimate of the flow.

    ``motion``: mean over neighbouring frames, channels and pixels of |x_(t+1) - x_t| / 255; 0 for a still picture.
    It takes flicker and noise for motion. ``motion_dino``, where an extractor is given: mean over neighbouring frames
    of 1 - cos(f_t, f_(t+1)) of its features f, in [0, 2], which tells a change of what is seen from noise.
    """

    looks_at: Literal["images", "videos"] = "videos"

    def __init__(self, extractor: Extractor | None = None) -> None:
        self.extractor = extractor
        self.names: tuple[str, ...] = ("motion",) if extractor is None else ("motion", "motion_dino")
        self.name = "mean absolute difference of neighbouring frames"
        self.sha256: str | None = None
        self.verified = True
        if extractor is not None:
            self.name += f"; 1 - cosine of their features, {extractor.name}"
            self.sha256, self.verified = extractor.sha256, bool(getattr(extractor, "verified", True))

    def __call__(self, images: Tensor, asked: Asked = None) -> Mapping[str, Tensor]:
        """Videos, uint8 (N, F, 1 or 3, H, W), F >= 2 -> float64 (N,) by name. Raises ValueError for anything else."""
        frames_of(images)
        if images.ndim != 5 or images.shape[1] < 2:
            raise ValueError("motion is of videos, which have two or more frames")
        numbers = {"motion": torch.cat([frame_difference(part) for part in images.split(_AT_ONCE)])}
        if self.extractor is not None:
            extractor = self.extractor
            parts = [_feature_difference(part, extractor) for part in images.split(_AT_ONCE)]
            numbers["motion_dino"] = torch.cat(parts)
        return numbers

    def note(self) -> str | None:
        return None


def frame_difference(videos: Tensor) -> Tensor:
    """Mean |x_(t+1) - x_t| / 255 of each video: uint8 (N, F, C, H, W) -> float64 (N,), on the CPU."""
    frames = videos.to(torch.int16)
    return (frames[:, 1:] - frames[:, :-1]).abs().double().mean(dim=(1, 2, 3, 4)).cpu() / 255


def _feature_difference(videos: Tensor, extractor: Extractor) -> Tensor:
    """Mean 1 - cos of the features of neighbouring frames, float64 (N,), on the CPU."""
    features = extractor(videos.flatten(0, 1)).features.double().cpu().unflatten(0, videos.shape[:2])
    return (1 - cosine_similarity(features[:, 1:], features[:, :-1], dim=2)).mean(dim=1)
