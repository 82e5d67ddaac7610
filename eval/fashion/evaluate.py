"""How the numbers beside the teachers are measured: samples of the stock pipelines against the test images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionInpaintPipeline
from torch import Tensor
from tqdm import tqdm

from fewstep.conditioning.item import Item
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.scorers.kept import kept, picture_and_hole
from fewstep.fashion.classifier import FashionClassifier, extract
from fewstep.fashion.prompts import PROMPTS

BATCH = 100
OFF = 1.0


@dataclass(frozen=True)
class Row:
    """One line of a table.

    fd: Fréchet distance to the 10,000 test images. agreement: share of samples that the classifier names as asked.
    kept: of a teacher that fills holes, the mean of :func:`fewstep.eval.scorers.kept.kept`.
    """

    steps: int
    guidance_scale: float
    even_grid: bool
    samples: int
    fd: float
    agreement: float
    kept: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: what there is."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded."""
    return (images.float().clamp(0, 1) * 255).round().byte()


def sample(
    pipeline: DiffusionPipeline,
    labels: Tensor,
    steps: int,
    guidance_scale: float,
    even_grid: bool,
    seed: int,
    items: Sequence[Item] = (),
) -> Tensor:
    """uint8 (N, 1, 32, 32): one sample for each label's prompt, in batches of 100, seeded per batch.

    Args:
        items: one for each label, of a teacher that looks at pictures; three channels become their mean.
        even_grid: pass the flow pipeline sigmas 1, (N-1)/N, ..., 1/N. Its scheduler's own grid ends at 0.001, which
            wastes the last of few steps.
    """
    extra = {"sigmas": [1 - i / steps for i in range(steps)]} if even_grid else {}
    images = []
    for index, batch in enumerate(labels.split(BATCH)):
        shown = items[index * BATCH : index * BATCH + len(batch)]
        pictures = {name: [item.arguments[name] for item in shown] for item in shown[:1] for name in item.pictures}
        output = pipeline(
            [PROMPTS[label] for label in batch.tolist()],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed + index),
            output_type="pt",
            **extra,
            **pictures,
        )
        images.append(to_bytes(output.images.mean(1, keepdim=True)))
    return torch.cat(images)


def given(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """The pictures of inpainting items, uint8 (N, 1, 32, 32), and their holes, bool (N, 1, 32, 32)."""
    pairs = [pair for item in items if (pair := picture_and_hole(item)) is not None]
    pictures, holes = (torch.stack(some) for some in zip(*pairs, strict=True))
    return pictures, holes


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
    items: Sequence[Item] = (),
) -> list[Row]:
    """One row for each (steps, guidance scale, even grid); items: one for each sample, of a teacher that looks."""
    pipeline.set_progress_bar_config(disable=True)
    labels = balanced_labels(count)
    rows = []
    for steps, guidance_scale, even_grid in tqdm(settings, desc="measuring"):
        images = sample(pipeline, labels, steps, guidance_scale, even_grid, seed, items)
        features, logits = extract(classifier, images)
        distance = frechet_distance(*feature_statistics(features), mean, covariance)
        share = agreement(logits, labels)
        same = round(kept(images, *given(items)).mean().item(), 4) if items else None
        rows.append(Row(steps, guidance_scale, even_grid, count, round(distance, 3), round(share, 4), same))
        tqdm.write(str(rows[-1]))
    return rows


def table_settings(pipeline: DiffusionPipeline, guidance_scale: float) -> list[tuple[int, float, bool]]:
    """1, 2, 4 and 25 steps, unguided and guided; for the flow pipeline also 2 and 4 steps on an even grid.

    A pipeline that looks at pictures is measured guided alone, as it is used.
    """
    scales = (guidance_scale,) if isinstance(pipeline, StableDiffusionInpaintPipeline) else (OFF, guidance_scale)
    settings = [(steps, scale, False) for scale in scales for steps in (1, 2, 4, 25)]
    if isinstance(pipeline, StableDiffusion3Pipeline):
        settings += [(steps, scale, True) for scale in (OFF, guidance_scale) for steps in (2, 4)]
    return settings
