"""A student from its plan to its folders: what it will be as a pipeline, and in which forms it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from fewstep.diffusion.phases import Phase
from fewstep.export.any_flow import any_flow_network, any_flow_recording
from fewstep.export.flow_map import flow_map_recording, whole_network
from fewstep.export.folder import remove_student
from fewstep.export.full_precision import in_full_precision
from fewstep.export.lora import export_lora, rehearse_lora, why_no_lora
from fewstep.export.lost_parts import refuse_lost_parts
from fewstep.export.phased import moves_boundary, phased_plan, phased_recording
from fewstep.export.speed_up import speed_up_recording
from fewstep.export.walk.control import as_student
from fewstep.export.walk.plan import StudentPlan
from fewstep.export.whole import check_counts, export_student, refuse_own_code
from fewstep.networks.flow_map import SECOND_TIME
from fewstep.networks.roles import Role
from fewstep.networks.speed_up import SPEED_UP
from fewstep.networks.two_time_form import DeltaTime
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_scheduler, is_quantized, with_parts
from fewstep.teachers.lora import FusedLora

#: The folders of a run that hold its student, the whole pipeline and the LoRA.
WHOLE, LORA = "student", "student_lora"


@dataclass(frozen=True)
class Written:
    """What was written of a student.

    Attributes:
        folders: the whole pipeline first, where there is one.
        note: why it is a whole pipeline although a LoRA was trained; else empty.
    """

    folders: tuple[Path, ...]
    note: str


@dataclass(frozen=True)
class Student:
    """What a student is beside its weights.

    Attributes:
        teacher: the recording that its roles start from.
        recording: of the pipeline that it will be: the teacher's own, unless it has other experts, a second time, or
            a second network that is switched at other times.
        plan: how it moves.
        teacher_lora: what was fused into the teacher.
    """

    teacher: Recording
    recording: Recording
    plan: StudentPlan
    teacher_lora: FusedLora | None = None

    @classmethod
    def of(cls, teacher: Recording, plan: StudentPlan, teacher_lora: FusedLora | None = None) -> Student:
        """A student on the teacher's own network."""
        student = cls(teacher, teacher, plan, teacher_lora)
        return replace(student, recording=student.walked)

    @cached_property
    def walked(self) -> Recording:
        """The teacher's recording with its second network, where it has one, switched as the student's walk does it."""
        return as_student(self.teacher, self.plan.scheduler, self.plan.call, self.plan.steps)

    def phased(self, phases: Sequence[Phase]) -> Student:
        """The same with an expert for each phase; untrained, it samples at every count.

        Raises:
            UserError: the phases do not fit this teacher, or its pipeline does not walk with as many networks.
        """
        recording = phased_recording(self.walked, phases)
        return replace(self, recording=recording, plan=phased_plan(self.plan, phases))._checked()

    def resized(self, recording: Recording) -> Student:
        """The same on the network of another recording of its pipeline; untrained, it samples at every count.

        Raises:
            UserError: its pipeline does not walk so.
        """
        return replace(self, recording=recording)._checked()

    def flow_map(self, second_time: nn.Module) -> Student:
        """The same, told where its steps end; untrained, it samples at every count.

        Raises:
            UserError: its pipeline does not walk so.
        """
        return self._told(second_time)._checked()

    def plugged(self, adapter: nn.Module) -> Student:
        """The same with an adapter on its network's attention; untrained, it samples at every count.

        Raises:
            UserError: its pipeline does not walk so.
        """
        return replace(self, recording=speed_up_recording(self.walked, adapter))._checked()

    def _told(self, second_time: nn.Module) -> Student:
        """The same with the pipeline that tells its network this second time: ours, or diffusers' own."""
        make: Callable[[Recording, Any], Recording] = flow_map_recording
        if isinstance(second_time, DeltaTime):
            make = any_flow_recording
        return replace(self, recording=make(self.walked, second_time))

    def described(self, **what: Any) -> Student:
        """The same with other fields of its :class:`fewstep.export.StudentPlan`."""
        return replace(self, plan=replace(self.plan, **what))

    @property
    def why_whole(self) -> str | None:
        """Why no LoRA of the base model can hold this student; None where one can."""
        if SECOND_TIME in self.recording.pipeline.components or self.recording.recipe.needs_next:
            return "no LoRA holds its second time"
        if hasattr(self.plan.scheduler, "code_file"):
            return "no LoRA holds the code of its scheduler"
        if moves_boundary(self.teacher, self.recording):
            return "its base model has no room for the student's networks"
        return why_no_lora(self.teacher, self.teacher_lora)

    def forms(self, lora: bool, merge: bool) -> tuple[str, ...]:
        """The folders that it is written to, :data:`WHOLE` before :data:`LORA`.

        Args:
            lora: whether adapters are trained.
            merge: whether a whole pipeline is wanted beside a LoRA.
        """
        if not lora or self.why_whole is not None:
            return (WHOLE,)
        return (WHOLE, LORA) if merge else (LORA,)

    def refuse_unwritable(self, lora: bool, merge: bool) -> None:
        """Raise ``UserError`` for a student that cannot be written, before it is trained."""
        refuse_lost_parts(self.teacher)
        if WHOLE in self.forms(lora, merge):
            refuse_own_code(self.teacher.pipeline)

    def rehearse(self, role: Role, merge: bool) -> None:
        """Raise ``UserError`` for a role whose LoRA diffusers would not load, before it is trained."""
        if LORA in self.forms(role.is_adapter, merge):
            rehearse_lora(self.teacher, role, self.plan, self.teacher_lora)

    def write(
        self,
        role: Role,
        out: Path,
        *,
        merge: bool,
        export_dtype: str | None = None,
        before_whole: Callable[[], None],
        load_unquantized: Callable[[dict[str, Any]], DiffusionPipeline],
        **about: Any,
    ) -> Written:
        """Write a role in its forms below ``out``; a form that it has no longer, of an earlier write, is removed.

        Args:
            role: that is sampled.
            out: folder of the run.
            merge: also write a whole pipeline where a LoRA holds the student.
            export_dtype: of the trained network in a whole pipeline's files; None: what the teacher's has in its files.
            before_whole: called before a whole pipeline is written: brings back the weights that were freed.
            load_unquantized: gives a quantised teacher's pipeline in full precision, when it is told the parts that are
                there.
            **about: for the card, see :func:`fewstep.export.export_student`.

        Raises:
            ExportError: a folder is in use, or what was written does not sample as planned.
        """
        student = self
        if role.has_second_time:  # the exported role's own: an average has another one than the student in training
            student = self._told(role.added[SECOND_TIME])
        if SPEED_UP in role.added:
            student = replace(self, recording=speed_up_recording(self.walked, role.added[SPEED_UP]))
        recording: Recording
        network: nn.Module
        lora = role.is_adapter
        forms = student.forms(lora, merge)
        about |= {"teacher_lora": self.teacher_lora}
        if LORA in forms:
            export_lora(self.teacher, role, self.plan, out / LORA, **about)
        if WHOLE in forms:
            before_whole()
            if student.recording.recipe.needs_next:
                recording, network = student.recording, any_flow_network(role, self.teacher, student.recording)
            elif is_quantized(self.teacher.network):
                recording, network = in_full_precision(load_unquantized, self.teacher, student.recording, role)
            else:
                recording, network = student.recording, whole_network(role)
            export_student(recording, network, self.plan, out / WHOLE, export_dtype=export_dtype, **about)
        for stale in {WHOLE, LORA}.difference(forms):
            remove_student(out / stale)
        note = f"{student.why_whole}: exported merged, as a pipeline" if lora and LORA not in forms else ""
        return Written(tuple(out / form for form in forms), note)

    def _checked(self) -> Student:
        """This student, once its pipeline, untrained, was seen to walk at every count that is planned."""
        scheduler = {find_scheduler(self.teacher.pipeline): self.plan.scheduler}
        check_counts(self.recording, with_parts(self.recording.pipeline, **scheduler), self.plan, self.plan.call)
        return self
