"""Export: plan which stock scheduler carries a student, prove it, write it as a stock pipeline, load it again."""

from fewstep.export.errors import ExportError
from fewstep.export.load import load
from fewstep.export.plan import StudentPlan, plan_student
from fewstep.export.student import export_student, verify_student
from fewstep.export.walk import WalkError

__all__ = ["ExportError", "StudentPlan", "WalkError", "export_student", "load", "plan_student", "verify_student"]
