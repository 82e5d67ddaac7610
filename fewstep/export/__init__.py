"""A student as a stock pipeline: which stock scheduler carries it, the proof that it does, writing and loading it."""

from fewstep.export.apply import apply
from fewstep.export.errors import ExportError, SchedulerCheckError
from fewstep.export.hub import publish
from fewstep.export.load import load
from fewstep.export.lora import export_lora, loads_lora, why_no_lora
from fewstep.export.plug import plug
from fewstep.export.steering import nasa
from fewstep.export.walk.plan import StudentPlan, plan_student
from fewstep.export.whole import export_student, refuse_own_code, verify_student

__all__ = [
    "ExportError",
    "SchedulerCheckError",
    "StudentPlan",
    "apply",
    "export_lora",
    "export_student",
    "load",
    "loads_lora",
    "nasa",
    "plan_student",
    "plug",
    "publish",
    "refuse_own_code",
    "verify_student",
    "why_no_lora",
]
