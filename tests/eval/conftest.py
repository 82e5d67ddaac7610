"""A toy judge and a saved student for the tests of the evaluation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler
from toy_models import ToyExtractor, tiny_dit

from fewstep.eval.features import Reference
from fewstep.eval.judge import Judge
from fewstep.eval.metrics.frechet import feature_statistics


@pytest.fixture
def judge() -> Judge:
    extractor = ToyExtractor()
    generator = torch.Generator().manual_seed(1)
    features = extractor(torch.randint(0, 256, (64, 1, 16, 16), generator=generator, dtype=torch.uint8)).features
    reference = Reference(
        name="toy images",
        metric="FD-toy",
        extractor_sha256="f00d",
        features=features,
        labels=torch.arange(64) % 4,
        mean=feature_statistics(features)[0],
        covariance=feature_statistics(features)[1],
        count=len(features),
        floors={"held-back images": 0.01},
    )
    return Judge(extractor, reference)


@pytest.fixture(scope="session")
def saved_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny_dit(LCMScheduler(original_inference_steps=4, clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def student(saved_dit: Path, tmp_path: Path) -> Path:
    """A run folder with a 4-step student whose card says that two steps do not hold."""
    folder = tmp_path / "run" / "student"
    shutil.copytree(saved_dit, folder)
    card = {
        "method": "dmd2",
        "steps": 4,
        "timesteps": [999, 749, 499, 249],
        "renoise": "fresh",
        "call": {"num_inference_steps": 4, "guidance_scale": 1.0},
        "prediction_type": "epsilon",
        "base_model": "dit",
        "fewstep_version": "0.1.0",
        "conditional": "label",
        "counts": [1, 4],
        "training": {"teacher": "somewhere/dit", "classes": "0-3", "guidance_scale": 2.0, "call": None},
    }
    (folder / "fewstep.json").write_text(json.dumps(card))
    return folder
