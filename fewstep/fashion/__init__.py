"""The embedded teachers and the files of their metric: Fashion-MNIST at 32x32, small enough for a CPU.

``python -m fewstep.eval.fashion.build all`` rebuilds everything here from the data set's idx files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.fashion.classifier import FashionClassifier
from fewstep.fashion.files import CLASSIFIER, DATA, HELD_BACK_IMAGES, REFERENCE, TRAINING_IMAGES, manifest, verified
from fewstep.fashion.prompts import CLASSES, PROMPTS

__all__ = [
    "CLASSES",
    "PROMPTS",
    "TEACHERS",
    "TEXT_TEACHERS",
    "FashionClassifier",
    "Reference",
    "Teacher",
    "held_back_images",
    "load_classifier",
    "looking",
    "reference",
    "teacher_path",
    "training_images",
]


@dataclass(frozen=True)
class Teacher:
    """An embedded teacher and the call that its numbers belong to.

    guidance_scale is diffusers' (1.0 is off); the scheduler is the one in the teacher's folder. looks: a call takes a
    picture and a mask beside the prompt, as the items of :mod:`fewstep.fashion.items` have them.
    """

    name: str
    guidance_scale: float
    steps: int = 25
    note: str = ""
    looks: bool = False


_GUIDANCE_NOTE = (
    "Guidance 3 gives clear pictures of what was asked; the Fréchet distance alone, which rewards variety, "
    "is lower with less"
)

TEACHERS: dict[str, Teacher] = {
    "fashion-sd": Teacher(
        "fashion-sd",
        guidance_scale=3.0,
        note="StableDiffusionPipeline: UNet, epsilon, DDIM with trailing steps. " + _GUIDANCE_NOTE,
    ),
    "fashion-flow": Teacher(
        "fashion-flow",
        guidance_scale=3.0,
        note="StableDiffusion3Pipeline: transformer, flow matching, Euler without shift. " + _GUIDANCE_NOTE + ". "
        "The third text encoder always says one zero token, so that the text is ten tokens long and not 265",
    ),
    "fashion-inpaint": Teacher(
        "fashion-inpaint",
        guidance_scale=2.5,
        note="StableDiffusionInpaintPipeline: fashion-sd with nine channels in, which fills holes in pictures",
        looks=True,
    ),
}
#: Those that are asked by prompts alone.
TEXT_TEACHERS = tuple(name for name, teacher in TEACHERS.items() if not teacher.looks)


def teacher_path(name: str) -> Path:
    """Folder of an embedded teacher, for ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: for a name that is not in TEACHERS.
    """
    if name not in TEACHERS:
        raise ValueError(f"no embedded teacher is called {name!r}: there are {', '.join(TEACHERS)}")
    return DATA / name


def looking(name: str | None) -> bool:
    """Whether a name is that of an embedded teacher that is shown a picture and a mask."""
    return name in TEACHERS and name not in TEXT_TEACHERS


def training_images() -> tuple[Tensor, Tensor]:
    """10,000 training images, 1,000 of each class: uint8 (10000, 1, 32, 32) and labels int64 (10000,)."""
    return _images(TRAINING_IMAGES)


def held_back_images() -> tuple[Tensor, Tensor]:
    """5,000 images that trained nothing, 500 of each class: uint8 (5000, 1, 32, 32) and labels int64 (5000,)."""
    return _images(HELD_BACK_IMAGES)


def _images(name: str) -> tuple[Tensor, Tensor]:
    with np.load(verified(name), allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))
    return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels


def load_classifier(device: str | torch.device = "cpu") -> FashionClassifier:
    """The metric's network in eval mode, frozen.

    Raises:
        UserError: when its file is missing or is not the one that the manifest names.
    """
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(verified(CLASSIFIER)))
    return classifier.to(device).eval().requires_grad_(False)


@dataclass(frozen=True)
class Reference:
    """Features of the 10,000 test images, and what a perfect generator would reach.

    Attributes:
        features: float16 (10000, 64). labels: int64 (10000,).
        mean: float64 (64,). covariance: float64 (64, 64). Of the features before they were rounded to float16.
        floors: Fréchet distances of the 5,000 held-back training images to the test images: "real" as they are,
            "autoencoder" after the teachers' autoencoder, which no student of theirs can be expected to beat.
        classifier_sha256: the network that the features belong to.
    """

    features: Tensor
    labels: Tensor
    mean: Tensor
    covariance: Tensor
    floors: dict[str, float]
    classifier_sha256: str


def reference() -> Reference:
    """The metric's reference.

    Raises:
        UserError: when its file is missing or is not the one that the manifest names.
    """
    stored = load_file(verified(REFERENCE))
    facts = manifest()
    return Reference(
        features=stored["features"],
        labels=stored["labels"].long(),
        mean=stored["mean"],
        covariance=stored["covariance"],
        floors=dict(facts["floors"]),
        classifier_sha256=facts["files"][CLASSIFIER]["sha256"],
    )
