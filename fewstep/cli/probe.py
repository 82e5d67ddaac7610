"""``fewstep probe TEACHER``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewstep.config.parsing import Parser, parse, with_values
from fewstep.programs.teacher import TeacherSettings, open_teacher


def run(words: Sequence[str]) -> None:
    """Print what is recorded of a pipeline, once that is proven."""
    parser = Parser(
        prog="fewstep probe", description="Show what is recorded of a pipeline; exit 0 only if it is proven."
    )
    parser.add_argument("teacher", type=str, help="folder, hub id, fashion-sd or fashion-flow")
    parser.add_argument("--call", type=dict[str, Any] | None, default=None, help="JSON for its call")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="let it run code from its own folder")
    parsed = parse(parser, with_values(words, {"trust_remote_code"}))
    settings = TeacherSettings(teacher=parsed.teacher, call=parsed.call, trust_remote_code=parsed.trust_remote_code)
    print(open_teacher(settings, "cpu").recording.summary())
