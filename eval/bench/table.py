"""A part's numbers as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewstep.data.durable import as_json, write_text_durably


@dataclass
class Table:
    """One table of a part.

    Attributes:
        title: a sentence.
        columns: of the table.
        rows: of cells in words, one for each column.
        numbers: the same and more for programs, one entry for each row.
        notes: sentences below it.
        failures: what is not as it should be; the program then ends with code 1.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, cells: Sequence[str], **numbers: Any) -> None:
        """One row."""
        self.rows.append(cells)
        self.numbers.append(numbers)

    def markdown(self) -> str:
        """For people."""
        ruler = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.columns, ruler, *self.rows)]
        below = [*self.notes, *(f"not as it should be: {line}" for line in self.failures)]
        return "\n".join([self.title, "", *lines, *(["", *below] if below else [])])

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"title": self.title, "rows": self.numbers, "notes": self.notes, "failures": self.failures}


def write(tables: Sequence[Table], machine: dict[str, Any], part: str, out: Path) -> Path:
    """Write ``PART.json`` and ``PART.md`` into a folder. Returns the first."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(table.markdown() for table in tables)
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    write_text_durably(out / f"{part}.md", f"{text}\n\nMeasured with: {about}\n")
    content = {"part": part, "machine": machine, "tables": [table.as_dict() for table in tables]}
    write_text_durably(out / f"{part}.json", json.dumps(as_json(content), indent=1) + "\n")
    return out / f"{part}.json"
