"""Teachers under the guidance of their call, as the methods of a run have them."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.networks.roles import Role
from fewstep.programs.teacher import TeacherSettings, guidance_of
from fewstep.recording import Recording


def guided_teacher(recording: Recording, call: dict[str, Any]) -> tuple[Role, GuidedDenoiser]:
    """The teacher's role, and that under the guidance of the call."""
    report = recording.guidance
    scale = guidance_of(TeacherSettings(teacher="t", call=call), recording)
    role = make_roles(RoleSettings(), recording, (), torch.device("cpu"))["teacher"]
    further, rescaling = recording.further, report.rescaling
    return role, GuidedDenoiser(role, scale, further, later=report.later_scales, rescaling=rescaling)
