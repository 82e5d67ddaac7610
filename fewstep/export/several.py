"""Several students of one teacher as one pipeline, which asks for each prompt or label the student that knows it.

Every student is a whole pipeline already, written and proved. What is joined are their files, as they are.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import one_line
from fewstep.export.about import call_of, read_about, write_about
from fewstep.export.card.card import write_card
from fewstep.export.errors import ExportError
from fewstep.export.folder import refuse_occupied, written
from fewstep.reading import read_json
from fewstep.recording.call.invocation import SUBJECT_ARGUMENTS
from fewstep.teachers.weights import load_pipeline

#: What all students of one pipeline have in common.
_SHARED = (
    "base_model",
    "call",
    "component",
    "conditional",
    "grids",
    "load",
    "pipeline",
    "renoise",
    "scheduler",
    "steps",
)
_INDEX = "model_index.json"
_SAME = 1e-4  # of a picture in [0, 1]: the same numbers by the same operations, but for how a device orders them


def join_students(folders: Sequence[Path], out: Path, license_fields: Mapping[str, str]) -> Path:
    """Write ``out`` as one pipeline of the students in ``folders``, and check that each request reaches its own.

    Args:
        folders: of the students' whole pipelines, in the order of their numbers.
        out: the folder, which appears complete or not at all.
        license_fields: of the teacher.

    Raises:
        ExportError: they are not all the students of one partition, ``out`` is in use, or a student that is asked there
            does not make what it makes alone.
    """
    abouts = [read_about(folder) for folder in folders]
    _refuse_strangers(folders, abouts)
    refuse_occupied(out)
    first = abouts[0]
    component = first["component"]
    names = (component, *(f"{component}_{number}" for number in range(2, len(folders) + 1)))
    own: Any = importlib.import_module("fewstep.pipelines.multi_student")
    with written(out) as partial:
        shutil.copytree(folders[0], partial, dirs_exist_ok=True)
        for folder, name in zip(folders[1:], names[1:], strict=True):
            shutil.copytree(folder / component, partial / name)
        _router(own, abouts).save_pretrained(partial / "router")
        own.save_code(partial, first["pipeline"], names)
        about = _about(first, own.CODE_FILE, names)
        write_about(partial, about)
        try:
            # What code there is in the folder was put there a moment ago, by this process.
            pipeline = load_pipeline(partial, **first["load"], trust_remote_code=True)
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(f"the joined students do not load: {one_line(error)}") from error
        card = write_card(about, pipeline, license_fields=license_fields, metrics=None, note=first["note"])
        (partial / "README.md").write_text(card, encoding="utf-8")
        _verify(pipeline, folders, abouts)
    return out


def _refuse_strangers(folders: Sequence[Path], abouts: Sequence[Mapping[str, Any]]) -> None:
    first = abouts[0]
    for number, (folder, about) in enumerate(zip(folders, abouts, strict=True), 1):
        part = about.get("part", {})
        if (part.get("number"), part.get("of")) != (number, len(folders)):
            raise ExportError(f"{folder} is not student {number} of {len(folders)}")
        if other := [name for name in _SHARED if about.get(name) != first.get(name)]:
            raise ExportError(f"{folder} and {folders[0]} differ in {', '.join(other)}; train them with one recipe")
        if part["places"] != first["part"]["places"]:
            raise ExportError(
                f"{folder} and {folders[0]} tell prompts apart by other numbers; train them with one recipe"
            )


def _router(own: Any, abouts: Sequence[Mapping[str, Any]]) -> Any:
    parts = [about["part"] for about in abouts]
    first = abouts[0]
    centroids = torch.tensor([part["centroid"] for part in parts])
    router = own.Router(
        subject=SUBJECT_ARGUMENTS[first["conditional"]],
        students=len(parts),
        known={name: number for number, part in enumerate(parts) for name in part["known"]},
        places=parts[0]["places"],
        width=centroids.shape[1],
        call=first["call"],
    )
    with torch.no_grad():
        router.centroids.copy_(centroids)
    return router


def _about(first: Mapping[str, Any], code_file: str, names: Sequence[str]) -> dict[str, Any]:
    """The ``fewstep.json`` of all: the first student's, without what is of that one alone."""
    about = {name: value for name, value in first.items() if name != "part"}
    training = {**first["training"], "only_student": None}
    return about | {
        "pipeline": "MultiStudentPipeline",
        "code": code_file,
        "students": list(names),
        "related": {},  # stock relatives know no router
        "training": training,
    }


@torch.no_grad()
def _verify(pipeline: Any, folders: Sequence[Path], abouts: Sequence[Mapping[str, Any]]) -> None:
    """Ask for every student's example, all of them in one call, and hold each picture against its student's own."""
    subject, call = SUBJECT_ARGUMENTS[abouts[0]["conditional"]], call_of(type(pipeline), abouts[0])
    examples = [about["example"] for about in abouts]
    pipeline.set_progress_bar_config(disable=True)

    def pictures(one: Any, requests: list[Any], seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        output = one(**{**call, subject: requests, "generator": generators, "output_type": "np"})
        return torch.as_tensor(next(iter(output.values())))

    for number, example in enumerate(examples):
        if (asked := pipeline.route(example)) != number:
            raise ExportError(f"{example!r} is of student {number + 1}, and student {asked + 1} is asked for it")
    seeds = range(len(folders))
    if abouts[0]["renoise"] == "ode":
        together = pictures(pipeline, examples, seeds)
    else:  # whose pipelines may draw fresh noise from torch's own numbers
        with torch.random.fork_rng():
            together = torch.cat([_seeded(pictures, pipeline, [e], [k]) for k, e in zip(seeds, examples, strict=True)])
    parts = _parts(folders[0]) - {abouts[0]["component"]}
    shared = {name: part for name, part in pipeline.components.items() if name in parts}
    for number, (folder, example) in enumerate(zip(folders, examples, strict=True)):
        alone = load_pipeline(folder, **{**abouts[0]["load"], **shared})
        alone.set_progress_bar_config(disable=True)
        with torch.random.fork_rng():
            picture = _seeded(pictures, alone, [example], [number])
        if (error := float((picture[0] - together[number]).abs().max())) > _SAME:
            raise ExportError(f"student {number + 1} makes another picture here than alone: {error:.1e} apart")


def _seeded(pictures: Any, pipeline: Any, requests: list[Any], seeds: Sequence[int]) -> Tensor:
    torch.manual_seed(0)
    made: Tensor = pictures(pipeline, requests, seeds)
    return made


def _parts(folder: Path) -> set[str]:
    index: dict[str, Any] = read_json(folder / _INDEX)
    return set(index)
