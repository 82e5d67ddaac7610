"""Who looks at samples: the extractors that make features of them, and the scorers that give each its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.features import Extractor
from fewstep.eval.grid import contact_sheet
from fewstep.eval.scorers import Scorer
from fewstep.eval.scorers.scorer import Asked

#: Samples that are looked at together, whoever made them and however many at once: a viewer's rounding depends on it.
BLOCK = 64
#: Of a video, evenly spaced.
FRAMES_SEEN = 8


@dataclass(frozen=True)
class ExtractorView:
    """Columns ``features`` (N, d) and, where it classifies, ``logits`` (N, classes); (N, frames, ...) of videos."""

    kind: str
    extractor: Extractor

    @property
    def about(self) -> dict[str, Any]:
        """What its columns depend on beside the images."""
        return {"extractor": self.extractor.name, "sha256": self.extractor.sha256, "resize": self.extractor.resize}

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why it does not look at samples of this shape ([F,] C, H, W); None where it does."""
        fits = self.extractor.accepts(tuple(shape[-3:]))
        return None if fits else f"{self.extractor.name} does not take images of {shape[-1]}x{shape[-2]} pixels"

    def see(self, images: Tensor, asked: Asked) -> dict[str, Tensor]:
        """Of uint8 samples (N, [F,] C, H, W)."""
        del asked
        frames = contact_sheet(images, FRAMES_SEEN) if images.ndim == 5 else images[:, None]
        seen = self.extractor(frames.flatten(0, 1))
        columns = {"features": seen.features} | ({} if seen.logits is None else {"logits": seen.logits})
        per_sample = {name: value.unflatten(0, frames.shape[:2]) for name, value in columns.items()}
        return {name: value if images.ndim == 5 else value[:, 0] for name, value in per_sample.items()}


@dataclass(frozen=True)
class ScorerView:
    """A column (N,) for each of the scorer's numbers; of videos over some frames, where it looks at images."""

    kind: str
    scorer: Scorer

    @property
    def about(self) -> dict[str, Any]:
        """What its columns depend on beside the samples and what they were asked for."""
        return {"scorer": self.scorer.name, "sha256": self.scorer.sha256}

    def refuses(self, shape: Sequence[int]) -> str | None:
        """Why it does not look at samples of this shape ([F,] C, H, W); None where it does."""
        return "these samples are no videos" if self.scorer.looks_at == "videos" and len(shape) == 3 else None

    def see(self, images: Tensor, asked: Asked) -> dict[str, Tensor]:
        """Of uint8 samples (N, [F,] C, H, W), one of ``asked`` each."""
        some = images.ndim == 5 and self.scorer.looks_at == "images"
        return dict(self.scorer(contact_sheet(images, FRAMES_SEEN) if some else images, asked))


View = ExtractorView | ScorerView


def views_of(extractors: Mapping[str, Extractor], scorers: Mapping[str, Scorer]) -> list[View]:
    """All of an evaluation."""
    return [
        *(ExtractorView(kind, extractor) for kind, extractor in extractors.items()),
        *(ScorerView(group, scorer) for group, scorer in scorers.items()),
    ]


def look(view: View, images: Tensor, asked: Asked) -> dict[str, Tensor]:
    """The columns of samples, in blocks: those of any :data:`BLOCK` samples do not depend on the others."""
    blocks = [
        view.see(part, None if asked is None else asked[first : first + BLOCK])
        for first, part in zip(range(0, len(images), BLOCK), images.split(BLOCK))
    ]
    return {name: torch.cat([block[name] for block in blocks]).cpu() for name in blocks[0]}
