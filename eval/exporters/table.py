"""Every benchmark that samples can be exported for, and the way there: nothing half, nothing over what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import UserError, one_line
from fewstep.eval.exporters.adm import adm
from fewstep.eval.exporters.benchmarks import read_items
from fewstep.eval.exporters.folders import geneval, geneval2, hpsv3, imagereward
from fewstep.eval.exporters.grids import dpg, oneig
from fewstep.eval.exporters.samples import Places, Sample

Exporter = Callable[[Iterable[Sample], Path, Places, Path, str], list[str]]


@dataclass(frozen=True)
class Layout:
    """A benchmark's way to keep samples.

    write: samples, a folder to write into, the prompts' places, the folder's name in the end, the model's name ->
    notes, of which the first is the benchmark's command. prompts: whether its own are needed, welcome or unknown.
    """

    write: Exporter
    prompts: str


#: By the word of ``--export``.
EXPORTERS: Mapping[str, Layout] = {
    "geneval": Layout(geneval, "needed"),
    "geneval2": Layout(geneval2, "needed"),
    "dpg": Layout(dpg, "needed"),
    "oneig": Layout(oneig, "needed"),
    "imagereward": Layout(imagereward, "welcome"),
    "hpsv3": Layout(hpsv3, "unknown"),
    "adm": Layout(adm, "unknown"),
}


@dataclass(frozen=True)
class Exported:
    """What was exported.

    samples: their number. command: of the benchmark's own reader, as its repository calls it, with these paths. notes:
    sentences that a reader of its numbers has to know.
    """

    folder: Path
    samples: int
    command: str
    notes: tuple[str, ...]


def export(
    kind: str, samples: Iterable[Sample], out: Path, benchmark: Path | None = None, model: str = "fewstep"
) -> Exported:
    """Samples in a benchmark's layout, in a new folder that is there when it is whole.

    Args:
        kind: a key of ``EXPORTERS``.
        samples: in the order of their indices; one is in memory at a time.
        out: the folder; it must not exist, or be empty.
        benchmark: the file, or folder, of the benchmark's own prompts (:func:`read_items`). The prompts of the samples
            are looked up in it.
        model: what the row is called in layouts that have several models.

    Raises:
        UserError: there is no such kind, its prompts are missing or other ones, the folder is taken, the pictures do
            not fit the layout, or it cannot be written. Nothing is left then.
    """
    if kind not in EXPORTERS:
        raise UserError(f"no benchmark is called {kind!r}: there are {', '.join(EXPORTERS)}")
    layout = EXPORTERS[kind]
    if layout.prompts == "needed" and benchmark is None:
        raise UserError(f"to export for {kind}, give the file of its prompts")
    if not model or model.startswith(".") or any(c in model for c in "/\\\0"):
        raise UserError(f"{model!r} cannot be a folder's name")
    places = Places(None if benchmark is None or layout.prompts == "unknown" else read_items(kind, benchmark))
    part = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already; export into a new folder")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        counted = _Counted(samples)
        command, *notes = layout.write(counted, part, places, out, model)
        if not counted.number:
            raise UserError("there is no sample to export")
        if out.exists():
            out.rmdir()  # it is empty
        part.replace(out)
    except OSError as error:
        raise UserError(f"the samples cannot be exported to {out}: {one_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(out, counted.number, command, tuple(notes))


class _Counted:
    """Samples, and how many there were."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples
        self.number = 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            self.number += 1
            yield sample
