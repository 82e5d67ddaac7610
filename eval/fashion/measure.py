"""The reference, the floors and the table of the teachers, written beside the weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file

from fewstep.eval.fashion.evaluate import Row, measure, table_settings
from fewstep.eval.fashion.files import write_manifest
from fewstep.eval.fashion.idx import Dataset
from fewstep.eval.fashion.train_autoencoder import reconstruct
from fewstep.eval.metrics.agreement import agreement
from fewstep.eval.metrics.frechet import feature_statistics, frechet_distance
from fewstep.fashion import TEACHERS, load_classifier, reference, teacher_path
from fewstep.fashion.classifier import extract
from fewstep.fashion.files import DATA, REFERENCE, manifest

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


def sweep(name: str) -> list[Row]:
    """25 steps at several guidance scales: how the scale in TEACHERS was chosen."""
    pipeline, judge = _load(name)
    settings = [(TEACHERS[name].steps, scale, False) for scale in SWEEP]
    return measure(pipeline, settings=settings, count=SWEEP_SAMPLES, **judge)


def write_table(name: str) -> list[Row]:
    """Few and many steps, guided and unguided, into the manifest."""
    pipeline, judge = _load(name)
    settings = table_settings(pipeline, TEACHERS[name].guidance_scale)
    rows = measure(pipeline, settings=settings, count=TABLE_SAMPLES, **judge)
    tables = manifest().get("teachers", {})
    tables[name] = {
        "command": f"{COMMAND} --teacher {name}",
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance_scale": TEACHERS[name].guidance_scale,
        "steps": TEACHERS[name].steps,
        "rows": [row.as_dict() for row in rows],
    }
    write_manifest({"teachers": tables})
    return rows
