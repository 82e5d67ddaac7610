"""Networks that are asked at times between those of their table, for methods that follow a trajectory continuously."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.errors import UserError
from fewstep.networks.derivative import refuse_underivable
from fewstep.networks.roles import Role
from fewstep.networks.trig_flow import ADVICE
from fewstep.recording import Recording
from fewstep.recording.pipeline import is_quantized

# Relative; another kernel for another dtype of the time, where the network runs in half precision.
_EQUAL = {torch.float64: 1e-6, torch.float32: 1e-4}


def refuse_undifferentiated(recording: Recording, exact: bool) -> None:
    """Raise ``UserError`` for a teacher of several networks, or one whose layers have no forward derivative.

    Args:
        recording: of the teacher.
        exact: whether a forward derivative is wanted.
    """
    if len(recording.experts) > 1:
        raise UserError(
            f"{type(recording.pipeline).__name__} has {len(recording.experts)} networks that share the time, and a "
            "trajectory is followed in one; take dmd2 or phased_dmd"
        )
    if exact and is_quantized(recording.network):
        raise UserError(f"the {recording.component} is quantised, and such layers have no derivative; {ADVICE}")


def ask_at_all_times(role: Role) -> None:
    """Feed a role's network float times even where it was recorded with integers."""
    denoiser = role.single.denoiser
    times = getattr(denoiser.recipe, "times", ())
    denoiser.continuous = any(not getattr(torch, rule.dtype).is_floating_point for rule in times)


@torch.no_grad()
def refuse_jumping(roles: dict[str, Role], x: Tensor, conditioning: AnyConditioning, exact: bool) -> None:
    """Refuse a student that answers otherwise when its time is no integer, or cannot be differentiated.

    Args:
        roles: student and teacher, which are one network still.
        x: a sample (2, ...).
        conditioning: of two samples.
        exact: whether a forward derivative is wanted.

    Raises:
        UserError: so it is.
    """
    teacher, student = (roles[name].single.denoiser for name in ("teacher", "student"))
    t = student.schedule.snap(torch.full((2,), 0.5, dtype=torch.float64, device=x.device))
    theirs, ours = (one.raw(x, t, conditioning) for one in (teacher, student))
    kind = type(teacher.network).__name__
    if not float((ours - theirs).abs().max()) <= _EQUAL.get(theirs.dtype, 3e-2) * float(theirs.abs().max()):
        raise UserError(f"{kind} answers otherwise when its time is no integer; take --variant lcm of consistency")
    if exact:
        refuse_underivable(lambda t: student.raw(x, t, conditioning), t, student.network, advice=ADVICE)
