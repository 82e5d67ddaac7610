"""Recordings of tiny teachers, made once for all tests of the export."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY
from torch import nn

from fewstep.recording import Recording, record


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Recording]:
    """Name of a builder in tests/tiny_pipelines.py -> its recording."""
    made: dict[str, Recording] = {}

    def get(name: str) -> Recording:
        if name not in made:
            build, call = TINY[name]
            made[name] = record(build(), **call)
        return made[name]

    return get


@pytest.fixture
def trained() -> Callable[[Recording], nn.Module]:
    """A stand-in for a trained student: the teacher's network with other weights."""

    def change(recording: Recording) -> nn.Module:
        network = copy.deepcopy(recording.network)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
        return network

    return change


@pytest.fixture
def subject() -> Callable[[Recording], dict[str, Any]]:
    """What a user's call adds to the student's ``call``."""
    words = {"prompt": {"prompt": "the cat"}, "label": {"class_labels": [1]}, None: {}}
    return lambda recording: words[recording.conditional]
