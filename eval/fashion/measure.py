"""The reference, the floors and the table of the teachers, written beside the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file

from fewstep.conditioning.item import Item
from fewstep.eval.fashion.evaluate import Row, given, measure, table_settings
from fewstep.eval.fashion.files import write_manifest
from fewstep.eval.fashion.idx import Dataset
from fewstep.eval.fashion.train_autoencoder import reconstruct
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.eval.scorers.kept import kept
from fewstep.fashion import CLASSES, TEACHERS, load_classifier, reference, teacher_path
from fewstep.fashion.classifier import extract
from fewstep.fashion.files import DATA, REFERENCE, manifest
from fewstep.fashion.items import inpainting_items

TABLE_SAMPLES = 5000
SWEEP_SAMPLES = 1000
SWEEP = (1.25, 1.5, 2.0, 3.0)
COMMAND = "python -m fewstep.eval.fashion.build table"


def write_reference(data: Dataset) -> dict[str, float]:
    """Features of the test images and their statistics, the floors, and the classifier's accuracies.

    The floors are measured as samples are: the 5,000 held-back images, as they are and after the shipped autoencoder,
    rounded to bytes.
    """
    classifier = load_classifier()
    features, logits = extract(classifier, data.test.images)
    mean, covariance = feature_statistics(features)
    stored = {
        "features": features.half(),
        "labels": data.test.labels.to(torch.uint8),
        "mean": mean,
        "covariance": covariance,
    }
    save_file(stored, DATA / REFERENCE)

    autoencoder = AutoencoderKL.from_pretrained(teacher_path("fashion-flow"), subfolder="vae")
    held_back, held_back_logits = extract(classifier, data.held_back.images)
    rebuilt, _ = extract(classifier, reconstruct(autoencoder, data.held_back.images))
    floors = {
        "real": frechet_distance(*feature_statistics(held_back), mean, covariance),
        "autoencoder": frechet_distance(*feature_statistics(rebuilt), mean, covariance),
    }
    accuracy = {
        "test": agreement(logits, data.test.labels),
        "held_back": agreement(held_back_logits, data.held_back.labels),
    }
    write_manifest({"floors": floors, "classifier_accuracy": accuracy})
    return floors


def _load(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The shipped pipeline, and what its samples are judged by."""
    judged_by = reference()
    judge = {"classifier": load_classifier(), "mean": judged_by.mean, "covariance": judged_by.covariance}
    return DiffusionPipeline.from_pretrained(teacher_path(name)), judge


def _items(name: str, count: int) -> list[Item]:
    """What a teacher that looks at pictures is shown: held-back ones, so that it has seen none of them."""
    return inpainting_items(count) if TEACHERS[name].looks else []


def kept_floors(items: Sequence[Item]) -> dict[str, float]:
    """What :func:`fewstep.eval.scorers.kept.kept` is of pictures that came about without any teacher.

    "autoencoder": the pictures themselves after the shipped autoencoder, the best that a sample can be. "blind":
    another picture of the same class, what one who was shown nothing would give.
    """
    pictures, holes = given(items)
    autoencoder = AutoencoderKL.from_pretrained(teacher_path("fashion-sd"), subfolder="vae")
    others = pictures.roll(len(CLASSES), dims=0)
    made = {"autoencoder": reconstruct(autoencoder, pictures), "blind": others}
    return {name: round(kept(images, pictures, holes).mean().item(), 4) for name, images in made.items()}


def sweep(name: str) -> list[Row]:
    """25 steps at several guidance scales: how the scale in TEACHERS was chosen."""
    pipeline, judge = _load(name)
    settings = [(TEACHERS[name].steps, scale, False) for scale in SWEEP]
    return measure(pipeline, settings=settings, count=SWEEP_SAMPLES, items=_items(name, SWEEP_SAMPLES), **judge)


def write_table(name: str, count: int = TABLE_SAMPLES) -> list[Row]:
    """Few and many steps, guided and unguided, into the manifest."""
    pipeline, judge = _load(name)
    settings = table_settings(pipeline, TEACHERS[name].guidance_scale)
    items = _items(name, count)
    rows = measure(pipeline, settings=settings, count=count, items=items, **judge)
    tables = manifest().get("teachers", {})
    tables[name] = {
        "command": f"{COMMAND} --teacher {name}" + (f" --num {count}" if count != TABLE_SAMPLES else ""),
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance_scale": TEACHERS[name].guidance_scale,
        "steps": TEACHERS[name].steps,
        "rows": [row.as_dict() for row in rows],
    }
    if items:
        tables[name]["kept_floors"] = kept_floors(items)
    write_manifest({"teachers": tables})
    return rows
