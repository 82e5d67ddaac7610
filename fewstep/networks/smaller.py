"""A student of another size than its teacher: a network of the same class with other settings, and fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.errors import UserError, one_line
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recording
from fewstep.recording.pipeline import with_parts


def resized_recording(recording: Recording, changes: Mapping[str, Any], seed: int) -> Recording:
    """The recording as if the pipeline's network had other settings; the teacher's own stays as it is.

    Args:
        recording: of the teacher.
        changes: settings of the network's class -> what they are instead of the teacher's.
        seed: of its weights, the same on every process.

    Raises:
        UserError: the network's class has no such settings, or cannot be made with them.
    """
    name, network = recording.component, recording.network
    if len(recording.experts) > 1:
        raise UserError("--student_network makes one network, and this teacher has several that share the time")
    settings: Any = getattr(network, "config", None)
    if settings is None:
        raise UserError(f"--student_network: {type(network).__name__} is no network of diffusers")
    # The hidden entries say which of the others were defaults, and would win over a change of these.
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    if unknown := sorted(changes.keys() - settings.keys()):
        raise UserError(f"--student_network: the {name} has no setting {', '.join(unknown)}")
    parameter = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make: Any = type(network)
        try:
            small = make.from_config({**settings, **changes})
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"--student_network: no {make.__name__} can be made so: {one_line(error)}") from error
    small = small.to(parameter.device, parameter.dtype).eval()
    pipeline = with_parts(recording.pipeline, **{name: small})
    (expert,) = recording.experts
    return replace(recording, pipeline=pipeline, network=small, experts=(replace(expert, network=small),))


@torch.no_grad()
def refuse_unanswering(recording: Recording, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> None:
    """Raise ``UserError`` for a network that cannot be asked as the teacher's is.

    Args:
        recording: of the student.
        x_t: samples (B, ...).
        t: times (B,).
        conditioning: of B samples.
    """
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type, None)
    try:
        shape = denoiser(x_t, t, conditioning).shape
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--student_network: it cannot be asked as the teacher is: {one_line(error)}") from error
    if shape != x_t.shape:
        raise UserError(f"--student_network: it says {list(shape[1:])} of samples {list(x_t.shape[1:])}")
