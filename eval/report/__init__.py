"""The result of an evaluation: numbers with everything needed to read them, as JSON, markdown, text and a page."""

from fewstep.eval.report.content import SCHEMA
from fewstep.eval.report.measure import Measure
from fewstep.eval.report.protocol import protocol
from fewstep.eval.report.report import Report

__all__ = ["SCHEMA", "Measure", "Report", "protocol"]
