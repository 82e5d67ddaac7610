"""A synthetic pipeline for every trait: recorded, proven, trained for two steps, and the student walks as planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.diffusion.strategic import Move
from fewstep.errors import UserError
from fewstep.export.student import Written
from fewstep.export.walk.plan import check_student, reference_of
from fewstep.export.whole import check_counts
from fewstep.networks.roles import Role
from fewstep.programs import distillation
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.pipeline import with_parts
from tests.recording.synthetic import synthetic
from tests.recording.synthetic_parts import RECORDABLE, SCHEDULERS, Traits

Dmd2Config = method_class("dmd2").Config
SETTINGS = {
    "teacher": "t",
    "steps": 4,
    "max_steps": 2,
    "batch_size": 2,
    "critic_updates": 1,
    "lr": 1e-2,
    "log_steps": 1,
}
SETTINGS |= {"report_to": "none", "cpu": True, "sample_steps": 0}


def walked(bench: Workbench, _method: str, role: Role, _encoders: Any) -> Written:
    """In place of the export, because diffusers does not have the class: the same check of the student, in memory."""
    student, recording, plan = role.stock_network(), bench.recording, bench.student.plan
    reference = reference_of(recording, {recording.component: student})
    pipeline = with_parts(recording.pipeline, network=student, scheduler=plan.scheduler)
    check_counts(recording, pipeline, plan, plan.call, reference)
    teacher = recording.network.state_dict()
    assert any(not torch.equal(value, teacher[name]) for name, value in student.state_dict().items())
    return Written((), "")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workbench]:
    """Opens a teacher once; every later run of the test is given the same."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.setattr("fewstep.export.student.refuse_own_code", lambda _pipeline: None)
    monkeypatch.setattr("fewstep.programs.distillation.export", walked)

    def make(pipeline: Any, **settings: Any) -> Workbench:
        words = {**SETTINGS, "out": str(tmp_path / "full"), "prompts": str(tmp_path / "prompts.txt"), **settings}
        bench = open_workbench(Dmd2Config(**words), "cpu", pipeline)
        monkeypatch.setattr("fewstep.programs.workbench.open_teacher", lambda *_, **__: bench.teacher)
        return bench

    return make


FORMS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_rank": 2}}


def in_forms(values: Iterable[Any], name: Callable[[Any], str]) -> list[Any]:
    """Each as full copies and as adapters: of every third the one or the other in turn, the rest in the soak.

    What a pipeline's traits are, adapters do not see: they lie inside its network. That each is recorded and proven,
    tests/recording/test_traits.py has of all.
    """
    return [
        pytest.param(value, form, id=f"{name(value)}-{form}", marks=() if place % 6 == 3 * turn else pytest.mark.soak)
        for place, value in enumerate(values)
        for turn, form in enumerate(FORMS)
    ]


def trained(bench: Workbench, tmp_path: Path, form: str) -> None:
    """Two steps, as full copies or as adapters."""
    distillation.run(replace(bench.config, out=str(tmp_path / form), **FORMS[form]), "dmd2")
    rows = [json.loads(line) for line in (tmp_path / form / "metrics.jsonl").read_text().splitlines()]
    # Where there is no guidance, teacher and critic agree in the first step.
    assert len(rows) == 2 and rows[1]["student/gradient_norm"] > 0


def named(traits: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in traits.items())


@pytest.mark.parametrize(("traits", "form"), in_forms([t for t in RECORDABLE if "next_time" not in t], named))
def test_every_trait_is_trained(
    traits: dict[str, Any], form: str, start: Callable[..., Workbench], tmp_path: Path
) -> None:
    run = start(synthetic(Traits(**traits)))
    expected = {2, 4} if traits.get("own_grid") == "linear_quadratic" else {1, 2, 4}
    assert expected <= set(run.student.plan.counts)
    trained(run, tmp_path, form)


@pytest.mark.parametrize(("name", "form"), in_forms(SCHEDULERS, str))
def test_every_family_of_schedulers_is_trained(
    name: str, form: str, start: Callable[..., Workbench], tmp_path: Path
) -> None:
    make, traits = SCHEDULERS[name]
    run = start(synthetic(Traits(**traits), make()))
    assert {1, 2, 4} <= set(run.student.plan.counts)
    trained(run, tmp_path, form)


@pytest.mark.parametrize("traits", [t for t in RECORDABLE if "next_time" in t], ids=named)
def test_a_network_with_a_next_time_is_refused(traits: dict[str, Any], start: Callable[..., Workbench]) -> None:
    with pytest.raises(UserError, match="told the next time too, which no method here can train yet"):
        start(synthetic(Traits(**traits)))


def test_a_grid_that_has_no_single_step_is_refused_at_one(start: Callable[..., Workbench]) -> None:
    with pytest.raises(UserError, match="division by zero") as caught:
        start(synthetic(Traits(own_grid="linear_quadratic")), steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("traits", [{}, {"layout": "packed"}, {"dynamic_shift": True}], ids=named)
def test_fresh_noise_walks_too(traits: dict[str, Any], start: Callable[..., Workbench]) -> None:
    run = start(synthetic(Traits(**traits)), renoise="fresh")
    pipeline = with_parts(run.recording.pipeline, scheduler=run.student.plan.scheduler)
    for count in run.student.plan.counts:
        assert (
            check_student(run.recording, pipeline, run.student.plan.call, Move("fresh"), count).grid
            == run.student.plan.grids[count]
        )


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "merge": True}, {"lora_rank": 2}], ids=str)
def test_a_student_that_cannot_be_written_is_refused_before_it_is_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Stock diffusers does not have this class, and its network takes no LoRA: adapters would be exported merged."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    words = {**SETTINGS, "out": str(tmp_path / "run"), "prompts": str(tmp_path / "prompts.txt"), **settings}
    with pytest.raises(UserError, match="which stock diffusers does not have: its student cannot be written"):
        distillation.run(Dmd2Config(**words), "dmd2", synthetic(Traits()))
    assert not (tmp_path / "run").exists()
