"""The result of an evaluation: numbers with everything needed to read them, as JSON, markdown and plain text."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.data.durable import write_text_durably
from fewstep.errors import UserError, first_line
from fewstep.eval.metrics.table import IMAGE_METRICS
from fewstep.eval.models import in_steps
from fewstep.reading import read_json

SCHEMA = 1
# metric -> (column title, how a value is printed); fd_test has columns of its own.
COLUMNS: dict[str, tuple[str, str]] = {
    **{name: (name, metric.format) for metric in IMAGE_METRICS for name in metric.names if name != "fd_test"},
    "latency_ms": ("latency ms", "{:.1f}"),
    "images_per_second": ("images/s", "{:.1f}"),
}


@dataclass
class Report:
    """What `fewstep.eval.evaluate` returns and writes as ``report.json`` and ``report.md``.

    rows: one dict per (model, step count): ``model``, ``role``, ``steps``, ``nfe`` (denoiser evaluations per sample,
    counted), ``metrics`` (name -> number), ``floor`` (what real images score in ``fd_test``, or None), ``relative``
    (``fd_test`` over the floor and over the teacher's), ``call`` and ``speed`` (the conditions of the timing).
    reference: extractor, weights_sha256, resize, n_gen, n_ref, id, floors, image_format; None when no extractor fits.
    skipped: one sentence per metric or row that is not there. notes: warnings a reader should see.
    """

    rows: list[dict[str, Any]]
    num: int
    seed: int
    reference: dict[str, Any] | None = None
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        teacher = self.baseline()
        for row in self.rows:
            row["relative"] = _relative(row, teacher)

    def baseline(self) -> dict[str, Any] | None:
        """The teacher's row with the most steps, or None."""
        teachers = [row for row in self.rows if row["role"] == "teacher"]
        return max(teachers, key=lambda row: row["steps"], default=None)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a ``report.json``. Raises UserError when it cannot be read, or has another schema."""
        try:
            content = dict(read_json(Path(path)))
            known = content.pop("schema", None) == SCHEMA
            report = cls(**content) if known else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no report that can be read: {first_line(error)}") from error
        if report is None:
            raise UserError(f"{path} is not a report of this version")
        return report

    def save(self, out: Path) -> None:
        """Write ``report.json`` and ``report.md`` into the folder `out`."""
        write_text_durably(out / "report.json", json.dumps(self.to_dict(), indent=2, default=str) + "\n")
        write_text_durably(out / "report.md", self.markdown())

    def headlines(self) -> list[str]:
        """One sentence per student row: its Fréchet distance beside floor and teacher, its speed-up, its cost."""
        sentences = []
        teacher = self.baseline()
        for row in self.rows:
            if row["role"] != "student":
                continue
            facts = []
            fd = row["metrics"].get("fd_test")
            if fd is not None and self.reference:
                beside = [f"floor {row['floor']:.3f}"] if row["floor"] is not None else []
                if teacher and "fd_test" in teacher["metrics"]:
                    beside.append(f"teacher at {in_steps(teacher['steps'])} {teacher['metrics']['fd_test']:.3f}")
                facts.append(f"{self.reference['metric']} {fd:.3f}" + (f" ({', '.join(beside)})" if beside else ""))
            if teacher and (speedup := _ratio(teacher["metrics"].get("latency_ms"), row["metrics"].get("latency_ms"))):
                facts.append(f"{speedup:.1f}x as fast as the teacher's {in_steps(teacher['steps'])}")
            facts.append(f"{row['nfe']:g} network evaluation{'s' if row['nfe'] != 1 else ''}")
            sentences.append(f"{row['model']} at {in_steps(row['steps'])}: {', '.join(facts)}.")
        return sentences

    def table(self) -> str:
        """The table in plain text, then the headlines, notes and skips, for a terminal."""
        titles, cells = self._cells()
        widths = [max(len(line[c]) for line in [titles, *cells]) for c in range(len(titles))]
        lines = ["  ".join(_align(cell, widths[c], c) for c, cell in enumerate(line)) for line in [titles, *cells]]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*(line.rstrip() for line in lines), "", *self._sentences()])

    def markdown(self) -> str:
        """The content of ``report.md``."""
        titles, cells = self._cells()
        lines = ["# Evaluation", "", _markdown_row(titles)]
        lines.append(_markdown_row(["---" if c == 0 else "---:" for c in range(len(titles))]))
        lines += [_markdown_row(line) for line in cells]
        lines += ["", *(f"- {sentence}" for sentence in self._sentences()), "", "![grid](grid.png)", ""]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join([*lines, f"Made with {versions}." if versions else ""]).rstrip() + "\n"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Titles and cells of the table; columns without any value are left out."""
        name = self.reference["metric"] if self.reference else "FD"
        teacher = self.baseline()
        to_teacher = f"x teacher {teacher['steps']}" if teacher else "x teacher"
        columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            ("model", lambda row: row["model"]),
            ("steps", lambda row: str(row["steps"])),
            ("NFE", lambda row: f"{row['nfe']:g}"),
            (f"{name} (test)", lambda row: _format(row["metrics"].get("fd_test"), "{:.3f}")),
            ("floor", lambda row: _format(row["floor"], "{:.3f}")),
            ("x floor", lambda row: _format(row["relative"].get("fd_test_to_floor"), "{:.1f}")),
            (to_teacher, lambda row: _format(row["relative"].get("fd_test_to_teacher"), "{:.2f}")),
        ]
        for metric, (title, pattern) in COLUMNS.items():
            columns.append((title, partial(_metric_cell, metric, pattern)))
        cells = [[read(row) for _, read in columns] for row in self.rows]
        kept = [c for c in range(len(columns)) if any(line[c] for line in cells)]
        return [columns[c][0] for c in kept], [[line[c] or "-" for c in kept] for line in cells]

    def provenance(self) -> list[str]:
        """How the numbers were measured, in sentences."""
        sentences = [f"Every row: {self.num:,} samples, base seed {self.seed}; sample i has one seed in all rows."]
        if self.reference:
            r = self.reference
            sentences.append(
                f"{r['metric']}: {r['extractor']} (weights sha256 {r['weights_sha256'][:12]}, resize {r['resize']}) "
                f"against {r['id']}. Floors: "
                + "; ".join(f"{name} {value:.3f}" for name, value in r["floors"].items())
                + "."
            )
        return sentences

    def _sentences(self) -> list[str]:
        sentences = self.headlines() + self.provenance()
        timing = next((row["speed"] for row in self.rows if row.get("speed")), None)
        if timing:
            sentences.append(
                f"Latency: median of one sample a call; images/s at batch {timing['batch_size']}; "
                f"{timing['device']}, {timing['dtype']}, {timing['threads']} threads, torch {timing['torch']}."
            )
        return sentences + self.notes + self.skipped


def _relative(row: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> dict[str, float]:
    fd = row["metrics"].get("fd_test")
    ratios = {
        "fd_test_to_floor": _ratio(fd, row["floor"]),
        "fd_test_to_teacher": _ratio(fd, teacher["metrics"].get("fd_test")) if teacher else None,
    }
    return {name: value for name, value in ratios.items() if value is not None}


def _ratio(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _format(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _metric_cell(metric: str, pattern: str, row: Mapping[str, Any]) -> str:
    return _format(row["metrics"].get(metric), pattern)


def _align(cell: str, width: int, column: int) -> str:
    """Names to the left, numbers to the right."""
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _markdown_row(cells: list[str]) -> str:
    # A bar in a model's name would open another column.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
