"""A teacher's kind is read from its scheduler alone, and is that of the recording."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDPMScheduler, SCMScheduler

from fewstep.errors import UserError
from fewstep.fashion import TEACHERS
from fewstep.teachers.kind import kind_of_scheduler, scheduler_of
from fewstep.teachers.source import find_source
from tests import tiny_pipelines

KINDS = {"ddim": "table", "dit": "table", "stable_diffusion": "table", "flow": "flow", "edm": "edm"}


@pytest.mark.parametrize("family", tiny_pipelines.TINY)
def test_two_small_files_tell_the_kind(family: str, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.TINY[family][0]()
    pipeline.save_config(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    found = scheduler_of(find_source(str(tmp_path), weights=False), "t")
    assert type(found) is type(pipeline.scheduler)
    assert kind_of_scheduler(found) == kind_of_scheduler(pipeline.scheduler) == KINDS[family]


def test_the_embedded_teachers_are_one_of_each_measured_kind() -> None:
    kinds = {name: kind_of_scheduler(scheduler_of(find_source(name, weights=False), name)) for name in TEACHERS}
    assert kinds == {"fashion-sd": "table", "fashion-flow": "flow", "fashion-inpaint": "table"}


def test_a_scheduler_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "scheduler": ["own_code", "TheirScheduler"]}')
    source = find_source(str(tmp_path), weights=False)
    with pytest.raises(UserError, match=r"--teacher t: its scheduler cannot be opened: .*no scheduler of diffusers"):
        scheduler_of(source, "--teacher t")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "scheduler": ["diffusers", "DDIMScheduler"]}')
    with pytest.raises(UserError, match="--teacher t: its scheduler cannot be opened"):
        scheduler_of(source, "--teacher t")


def test_a_model_of_few_steps_is_no_teacher() -> None:
    assert kind_of_scheduler(DDPMScheduler()) == "table"
    with pytest.raises(ValueError, match="SCMScheduler is of a model of few steps already"):
        kind_of_scheduler(SCMScheduler())
