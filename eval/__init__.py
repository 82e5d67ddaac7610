"""Evaluation of students beside their teachers: generation, metrics, speed, reports, and a table of all methods."""

from fewstep.eval.config import EvalConfig
from fewstep.eval.evaluate import evaluate
from fewstep.eval.judge import Judge
from fewstep.eval.metrics.table import METRICS
from fewstep.eval.models import Model, student_model, teacher_model
from fewstep.eval.report import Report
from fewstep.eval.sample import sample

__all__ = ["METRICS", "EvalConfig", "Judge", "Model", "Report", "evaluate", "sample", "student_model", "teacher_model"]
