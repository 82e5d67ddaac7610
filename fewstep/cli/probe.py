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
    parser.add_argument("teacher", type=str, help="folder, file, hub id, or an embedded name")
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of a hub id")
    parser.add_argument("--subfolder", type=str | None, default=None, help="where in it the pipeline lies")
    parser.add_argument("--variant", type=str | None, default=None, help="of the weights, such as fp16")
    parser.add_argument("--call", type=dict[str, Any] | None, default=None, help="JSON for its call")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="let it run code from its own folder")
    parsed = parse(parser, with_values(words, {"trust_remote_code"}))
    settings = TeacherSettings(**vars(parsed))
    print(open_teacher(settings, "cpu").recording.summary())
