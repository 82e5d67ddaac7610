"""A run of several students: a run for each, one after the other in folders of their own, and then one pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from fewstep.config.partition import PartitionWanted
from fewstep.config.run import RunConfig
from fewstep.errors import Interrupted, UserError
from fewstep.export import publish
from fewstep.export.about import FILE
from fewstep.export.several import join_students
from fewstep.export.student import WHOLE
from fewstep.teachers.license import teacher_license
from fewstep.training.checkpoint import steps_in
from fewstep.training.distributed import join_launch, on_main
from fewstep.training.fate import shared_fate
from fewstep.training.run_folder import check_folder, forget_run, has_run, write_config

logger = logging.getLogger("fewstep")


def run_several(
    config: RunConfig, method: str, wanted: PartitionWanted, train: Callable[[RunConfig], Path], in_memory: bool
) -> Path:
    """Train every student that is not there yet, and join all of them. Returns the folder of their pipeline.

    The run of student k lies in ``OUT/student_k`` and is what ``--only_student k --out OUT/student_k`` makes, so that
    some of them may come from elsewhere.

    Args:
        config: of all.
        method: its name.
        wanted: the partition.
        train: runs a method to its student's folder.
        in_memory: the teacher was handed over as a pipeline.

    Raises:
        UserError: for everything that a user can mend.
        fewstep.errors.Interrupted: after Ctrl-C, with a checkpoint written.
    """
    out = Path(config.out)
    numbers = range(1, wanted.students + 1)
    folders = [out / f"student_{number}" for number in numbers]
    accelerator = join_launch(config.cpu)
    with shared_fate(accelerator, Interrupted):

        def begin() -> None:
            check_folder(out, method, config, in_memory, beside=[folder.name for folder in folders])
            write_config(out, method, config)

        on_main(accelerator, begin)
    students = []
    for number, folder in zip(numbers, folders, strict=True):
        own = _of_one(config, number, folder)
        if on_main(accelerator, partial(_is_done, own, method, in_memory)):
            students.append(folder / WHOLE)
            continue
        if accelerator.is_main_process:
            logger.info("student %d of %d, in %s", number, wanted.students, folder)
        try:
            train(own)
        except UserError:
            if accelerator.is_main_process and not any(map(has_run, folders)):
                forget_run(out)  # nothing has begun, and the mended command shall not ask for --resume
            raise
        students.append(folder / WHOLE)
    with shared_fate(accelerator, Interrupted):

        def finish() -> str:
            joined = join_students(students, out / WHOLE, teacher_license(config.teacher))
            return "" if config.push_to_hub is None else publish([joined], config.push_to_hub, config.hub_private)

        if note := on_main(accelerator, finish):
            logger.info(note)
    return out / WHOLE


def _of_one(config: RunConfig, number: int, folder: Path) -> RunConfig:
    """The settings of the run of one student, which is a whole pipeline and is not published by itself."""
    if "only_student" not in {one.name for one in fields(config)}:
        raise UserError("this method cannot train one student of several alone")
    return replace(
        config,
        only_student=number,  # type: ignore[call-arg]
        out=str(folder),
        resume=has_run(folder),
        merge=bool(config.lora_rank),
        push_to_hub=None,
        hub_private=False,
    )


def _is_done(config: RunConfig, method: str, in_memory: bool) -> bool:
    """Whether the run of a student went to its end; raises ``UserError`` where it has other settings."""
    out = Path(config.out)
    if not (out / WHOLE / FILE).is_file() or not has_run(out):
        return False
    check_folder(out, method, config, in_memory)
    return max(steps_in(out / "checkpoints"), default=0) >= config.max_steps
