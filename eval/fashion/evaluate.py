"""How the numbers beside the teachers are measured: samples of the stock pipelines against the test images."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm

from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.fashion.classifier import FashionClassifier, extract
from fewstep.fashion.prompts import PROMPTS

BATCH = 100
OFF = 1.0


@dataclass(frozen=True)
class Row:
    """One line of a table.

    fd: Fréchet distance to the 10,000 test images. agreement: share of samples that the classifier names as asked.
    """

    steps: int
    guidance_scale: float
    even_grid: bool
    samples: int
    fd: float
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded."""
    return (images.float().clamp(0, 1) * 255).round().byte()


def sample(
    pipeline: DiffusionPipeline, labels: Tensor, steps: int, guidance_scale: float, even_grid: bool, seed: int
) -> Tensor:
    """uint8 (N, 1, 32, 32): one sample for each label's prompt, in batches of 100, seeded per batch.

    Args:
        even_grid: pass the flow pipeline sigmas 1, (N-1)/N, ..., 1/N. Its scheduler's own grid ends at 0.001, which
            wastes the last of few steps.
    """
    extra = {"sigmas": [1 - i / steps for i in range(steps)]} if even_grid else {}
    images = []
    for index, batch in enumerate(labels.split(BATCH)):
        output = pipeline(
            [PROMPTS[label] for label in batch.tolist()],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
            output_type="pt",
            **extra,
        )
        images.append(to_bytes(output.images))
    return torch.cat(images)


def balanced_labels(count: int) -> Tensor:
    """0, 1, ..., 9, 0, 1, ... int64 (count,)."""
    return torch.arange(count) % len(PROMPTS)


def measure(
    pipeline: DiffusionPipeline,
    classifier: FashionClassifier,
    mean: Tensor,
    covariance: Tensor,
    settings: list[tuple[int, float, bool]],
    count: int,
    seed: int = 0,
) -> list[Row]:
    """One row for each (steps, guidance scale, even grid)."""
    pipeline.set_progress_bar_config(disable=True)
    labels = balanced_labels(count)
    rows = []
    for steps, guidance_scale, even_grid in tqdm(settings, desc="measuring"):
        images = sample(pipeline, labels, steps, guidance_scale, even_grid, seed)
        features, logits = extract(classifier, images)
        distance = frechet_distance(*feature_statistics(features), mean, covariance)
        share = agreement(logits, labels)
        rows.append(Row(steps, guidance_scale, even_grid, count, round(distance, 3), round(share, 4)))
        tqdm.write(str(rows[-1]))
    return rows


def table_settings(pipeline: DiffusionPipeline, guidance_scale: float) -> list[tuple[int, float, bool]]:
    """1, 2, 4 and 25 steps, unguided and guided; for the flow pipeline also 2 and 4 steps on an even grid."""
    settings = [(steps, scale, False) for scale in (OFF, guidance_scale) for steps in (1, 2, 4, 25)]
    if isinstance(pipeline, StableDiffusion3Pipeline):
        settings += [(steps, scale, True) for scale in (OFF, guidance_scale) for steps in (2, 4)]
    return settings
