"""What a written student says of other sizes, and the proof that it does what its teacher's pipeline computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fewstep.export.errors import ExportError
from fewstep.export.walk.check import SchedulerCheck
from fewstep.export.walk.plan import StudentPlan, check_student
from fewstep.export.walk.sizes import walked_sizes
from fewstep.export.walk.teacher_shift import teacher_shift

if TYPE_CHECKING:
    from fewstep.recording import Recording


def check_sizes(recording: Recording, pipeline: Any, plan: StudentPlan, call: Mapping[str, Any]) -> None:
    """Compare a student with what the teacher's pipeline computes at the student's own call, and at other sizes.

    Args:
        recording: of the pipeline that the student is, with the teacher's scheduler.
        pipeline: with the student's networks and scheduler.
        plan: of the student.
        call: that samples it; of a written student the one in its folder.

    Raises:
        ExportError: the teacher has another shift at that call than was planned for, or a size's walk differs.
    """
    if not plan.sizes:
        return
    changes = {name: value for name, value in call.items() if name != "num_inference_steps"}
    shift = teacher_shift(recording, changes, steps=plan.steps if plan.dynamic else None)
    if not math.isclose(shift, plan.sizes[0].shift, rel_tol=1e-6):
        raise ExportError(
            f"at the student's call the teacher shifts by {shift:.4g}, and the student was planned for "
            f"{plan.sizes[0].shift:.4g}"
        )

    def walk_at(size: Mapping[str, int]) -> SchedulerCheck:
        return check_student(recording, pipeline, {**call, **size}, plan.move, plan.steps)

    if plan.dynamic and walked_sizes(plan.sizes, plan.steps, walk_at) != plan.sizes:
        raise ExportError("the exported student visits other times at other sizes than it was planned for")


def about_sizes(plan: StudentPlan) -> dict[str, Any]:
    """What ``fewstep.json`` says of other sizes."""
    if not plan.sizes:
        return {}
    sizes = [
        {**one.size, "teacher_shift": one.shift, **({} if one.grid is None else {"grid": list(one.grid)})}
        for one in plan.sizes
    ]
    return {"dynamic_shift": {"kept": plan.dynamic, "shift": plan.shift, "sizes": sizes}}
