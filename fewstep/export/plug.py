"""Plugging a SpeedUpNet student's adapter into a fine-tuned copy of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fewstep.export.about import read_about, student_class
from fewstep.export.errors import ExportError
from fewstep.export.load import load
from fewstep.export.speed_up import with_adapter
from fewstep.networks.speed_up import SPEED_UP
from fewstep.recording.pipeline import find_scheduler


def plug(pipeline: DiffusionPipeline, student: str | Path) -> DiffusionPipeline:
    """A pipeline of a fine-tuned copy of the teacher, sped up by a SpeedUpNet student's adapter; nothing is trained.

    Args:
        pipeline: of the same class as the teacher's; it stays as it is.
        student: a folder that a run of ``speed_up_net`` wrote.

    Returns:
        Another pipeline of the same networks, whose call needs a prompt alone, and which ``save_pretrained`` writes as
        a student.

    Raises:
        ExportError: not such a student, or its adapter does not fit the network.
    """
    about = read_about(student)
    own: Any = load(student)
    if SPEED_UP not in own.components:
        raise ExportError(f"{student} is no student of speed_up_net, so it has no adapter to plug in")
    network: Any = pipeline.components.get(about["component"])
    if type(pipeline) not in type(own).__mro__ or network is None:
        raise ExportError(
            f"{student} is of another pipeline than {type(pipeline).__name__}, so the adapter does not fit"
        )
    theirs = {name: tensor.shape for name, tensor in getattr(own, about["component"]).state_dict().items()}
    if {name: tensor.shape for name, tensor in network.state_dict().items()} != theirs:
        raise ExportError(
            f"the {about['component']} is another network than that of {student}: the adapter does not fit"
        )
    parameter = next(network.parameters())
    plugged = with_adapter(pipeline, own.speed_up.to(parameter.device, parameter.dtype))
    name = find_scheduler(pipeline)
    plugged.register_modules(**{name: getattr(own, find_scheduler(own))})
    plugged.__class__ = student_class(type(plugged), about)
    return plugged
