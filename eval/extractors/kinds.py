"""The extractors that can be asked for, by name; a network is opened when it sees its first images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from fewstep.errors import UserError
from fewstep.eval.extractors.clip_image import ClipImageExtractor
from fewstep.eval.extractors.dinov2 import Dinov2Extractor
from fewstep.eval.extractors.inception import InceptionExtractor
from fewstep.eval.features import Extractor, FashionExtractor
from fewstep.eval.weights import Weights

#: What makes each kind, of weights and a device. The first of a family is the one of published numbers; the weights of
#: the last come with the package.
EXTRACTORS: Mapping[str, Callable[[Weights, torch.device | str], Extractor]] = {
    "inception": InceptionExtractor,
    "inception-legacy_tensorflow": partial(InceptionExtractor, mode="legacy_tensorflow"),
    "inception-legacy_pytorch": partial(InceptionExtractor, mode="legacy_pytorch"),
    "dino": Dinov2Extractor,
    "dino-base": partial(Dinov2Extractor, size="base"),
    "dino-small": partial(Dinov2Extractor, size="small"),
    "clip": ClipImageExtractor,
    "fashion": lambda _, device: FashionExtractor(device),
}


def open_extractor(kind: str, weights: Weights, device: torch.device | str = "cpu") -> Extractor:
    """An extractor whose file of weights is there and checked.

    Raises:
        MissingWeightsError: its file is nowhere; the message is the sentence for a report.
        UserError: an unknown kind, or a file that is damaged or another.
    """
    if kind not in EXTRACTORS:
        raise UserError(f"unknown extractor {kind}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[kind](weights, device)


def frechet_name(extractor: Extractor) -> str:
    """What a Fréchet distance of its features is called: FID only of Inception with its published weights."""
    inception = extractor.name.startswith("inception-2015-12-05")
    return "FID" if inception and extractor.verified else f"FD-{extractor.name}"
