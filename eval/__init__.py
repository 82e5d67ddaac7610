"""Evaluation of few-step students beside their teachers: generation, metrics, speed, report and pictures."""

from .config import METRICS, EvalConfig
from .evaluate import evaluate
from .judge import Judge
from .models import Model, student_model, teacher_model
from .report import Report
from .sample import sample

__all__ = ["METRICS", "EvalConfig", "Judge", "Model", "Report", "evaluate", "sample", "student_model", "teacher_model"]
