"""A report: what it holds, as files, and as text for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError, first_line
from fewstep.eval.report import words
from fewstep.eval.report.check import problem
from fewstep.eval.report.content import SCHEMA, Content
from fewstep.eval.report.measure import Measure
from fewstep.eval.report.page import page
from fewstep.eval.report.table import markdown_table, markdown_text, text_table
from fewstep.reading import read_json


class Report(Content):
    """What `fewstep.eval.evaluate` returns and writes as ``report.json``, ``.md`` and ``.html``; see `Content`."""

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """Read a ``report.json``.

        Raises:
            UserError: it cannot be read, has another schema, or holds something that no report has.
        """
        try:
            content = read_json(Path(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no report that can be read: {first_line(error)}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            raise UserError(
                f"{path} is a report of schema {schema}, and this version reads {SCHEMA}: run fewstep eval again"
            )
        if (wrong := problem(content)) is not None:
            raise UserError(f"{path} is no report: {wrong}")
        return cls(**_fields(content))

    def save(self, out: Path) -> None:
        """Write ``report.json``, ``report.md`` and ``report.html`` into the folder `out`, where the pictures are.

        Raises:
            ValueError: it holds what :meth:`load` would refuse.
            OSError: the disk is full or does not take it.
        """
        text = json.dumps(self.to_dict(), indent=2, default=str) + "\n"
        if (wrong := problem(json.loads(text))) is not None:
            raise ValueError(f"this report could not be read again: {wrong}")
        write_text_durably(out / "report.json", text)
        write_text_durably(out / "report.md", self.markdown())
        write_text_durably(out / "report.html", page(self, out))

    def headlines(self) -> list[str]:
        """One sentence per student row: first number of quality beside floor and teacher, speed-up, cost."""
        return words.headlines(self)

    def provenance(self) -> list[str]:
        """How the numbers were measured, in sentences."""
        return words.provenance(self)

    def table(self) -> str:
        """The table in plain text, then the headlines, notes and skips, for a terminal."""
        return "\n".join([text_table(self), "", *words.sentences(self)])

    def markdown(self) -> str:
        """The content of ``report.md``."""
        lines = [f"# {self.title}", "", markdown_table(self), ""]
        lines += [f"- {markdown_text(sentence)}" for sentence in words.sentences(self)]
        lines += [] if self.joined else ["", "![grid](grid.png)"]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines += ["", f"Made with {versions}."] if versions else []
        return "\n".join(lines) + "\n"


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    """What the constructor takes."""
    fields = {name: value for name, value in content.items() if name != "schema"}
    return fields | {"measures": {name: Measure(**measure) for name, measure in content["measures"].items()}}
