"""A synthetic pipeline for every trait: recorded, proven, trained for two steps, and the student walks as planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.export.plan import check_student, reference_of
from fewstep.export.whole import check_counts
from fewstep.networks.roles import Role
from fewstep.programs.distillation import Distillation
from fewstep.programs.methods import method_class
from fewstep.recording.pipeline import with_parts
from tests.recording.synthetic import RECORDABLE, SCHEDULERS, Traits, synthetic

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


def walked(run: Distillation, role: Role) -> None:
    """In place of the export, because diffusers does not have the class: the same check of the student, in memory."""
    student, recording, plan = role.stock_network(), run.recording, run.plan
    reference = reference_of(recording, {recording.component: student})
    pipeline = with_parts(recording.pipeline, network=student, scheduler=plan.scheduler)
    check_counts(recording, pipeline, plan, reference)
    teacher = recording.network.state_dict()
    assert any(not torch.equal(value, teacher[name]) for name, value in student.state_dict().items())


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Distillation]:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.setattr("fewstep.programs.distillation.refuse_own_code", lambda _pipeline: None)
    monkeypatch.setattr(Distillation, "export", walked)

    def make(pipeline: Any, **settings: Any) -> Distillation:
        words = {**SETTINGS, "out": str(tmp_path / "full"), "prompts": str(tmp_path / "prompts.txt"), **settings}
        return Distillation(Dmd2Config(**words), "dmd2", pipeline)

    return make


def trained(run: Distillation, tmp_path: Path) -> None:
    """As full copies, and as adapters; everything before the roles is the same for both."""
    run.run()
    run.config = replace(run.config, lora_rank=2, out=str(tmp_path / "lora"))
    run.out = tmp_path / "lora"
    run.out.mkdir()
    run.run()
    for form in ("full", "lora"):
        rows = [json.loads(line) for line in (tmp_path / form / "metrics.jsonl").read_text().splitlines()]
        # Where there is no guidance, teacher and critic agree in the first step.
        assert len(rows) == 2 and rows[1]["student/gradient_norm"] > 0


def named(traits: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in traits.items())


@pytest.mark.parametrize("traits", [t for t in RECORDABLE if "next_time" not in t], ids=named)
def test_every_trait_is_trained(traits: dict[str, Any], start: Callable[..., Distillation], tmp_path: Path) -> None:
    run = start(synthetic(Traits(**traits)))
    expected = {2, 4} if traits.get("own_grid") == "linear_quadratic" else {1, 2, 4}
    assert expected <= set(run.plan.counts)
    trained(run, tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_family_of_schedulers_is_trained(name: str, start: Callable[..., Distillation], tmp_path: Path) -> None:
    make, traits = SCHEDULERS[name]
    run = start(synthetic(Traits(**traits), make()))
    assert {1, 2, 4} <= set(run.plan.counts)
    trained(run, tmp_path)


@pytest.mark.parametrize("traits", [t for t in RECORDABLE if "next_time" in t], ids=named)
def test_a_network_with_a_next_time_is_refused(traits: dict[str, Any], start: Callable[..., Distillation]) -> None:
    with pytest.raises(UserError, match="told the next time too, which no method here can train yet"):
        start(synthetic(Traits(**traits)))


def test_a_grid_that_has_no_single_step_is_refused_at_one(start: Callable[..., Distillation]) -> None:
    with pytest.raises(UserError, match="division by zero") as caught:
        start(synthetic(Traits(own_grid="linear_quadratic")), steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("traits", [{}, {"layout": "packed"}, {"dynamic_shift": True}], ids=named)
def test_fresh_noise_walks_too(traits: dict[str, Any], start: Callable[..., Distillation]) -> None:
    run = start(synthetic(Traits(**traits)), renoise="fresh")
    pipeline = with_parts(run.pipeline, scheduler=run.plan.scheduler)
    for count in run.plan.counts:
        assert check_student(run.recording, pipeline, run.plan.call, "fresh", count).grid == run.plan.grids[count]
