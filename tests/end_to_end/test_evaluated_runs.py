"""Runs that are evaluated while they train, through to the student of the best evaluation."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.programs.distillation import distill
from fewstep.recording.watch.shake import shaken
from fewstep.training import checkpoint
from tests import tiny_pipelines
from tests.forked import well

RUN = {"steps": 2, "max_steps": 6, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True}
RUN |= {"critic_updates": 1, "sample_steps": 0, "lr": 1e-2, "ema_decay": 0.5}
EVALUATED = {"eval_steps": 1, "eval_samples": 3, "checkpoints_total_limit": 1}


class Scripted:
    """Gives numbers in their order, whatever it is shown; one that is made again goes on after ``step``."""

    name = "scripted"

    def __init__(self, numbers: Sequence[float]) -> None:
        self.best = {"fd": "lowest", "light": "highest"}
        self.numbers = iter(numbers)
        self.shapes: list[tuple[int, ...]] = []

    def teacher_samples(self) -> int:
        return 2

    def show_teacher(self, pictures: torch.Tensor, asked: object) -> None:
        self.teacher = pictures

    def __call__(self, pictures: torch.Tensor, asked: object) -> Mapping[str, float]:
        assert asked is None and pictures.dtype == torch.uint8
        self.shapes.append(tuple(pictures.shape))
        return {"fd": next(self.numbers), "light": pictures.double().mean().item()}


def run(out: Path, numbers: Sequence[float], **settings: Any) -> tuple[Path, Scripted]:
    one = Scripted(numbers)

    def make(config: RunConfig, device: torch.device) -> Scripted:
        assert (config.eval_samples, device.type) == (3, "cpu")
        return one

    pipeline = tiny_pipelines.tiny_ddim()
    with shaken(pipeline.unet):
        folder = distill(pipeline, "dmd2", evaluator=make, out=str(out), **{**RUN, **EVALUATED, **settings})
    return folder, one


def same(student: Path, held: Path, step: int) -> bool:
    """Whether a student has the averaged weights of a step's checkpoint."""
    found = checkpoint.find_step(held, step).tensors()["ema"]
    network = DiffusionPipeline.from_pretrained(student).unet.state_dict()
    return all(torch.equal(network[name.removeprefix("network.")], value) for name, value in found.items())


def test_a_run_ends_early_and_its_best_student_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fewstep"):
        student, one = run(tmp_path, [9.0, 7.0, 8.0, 7.5], eval_patience=2, export_best=True)
    assert one.shapes == [(3, 3, 8, 8)] * 4 and one.teacher.shape == (2, 3, 8, 8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["eval/fd"]) for row in lines] == [(0, 9.0), (1, 7.0), (2, 8.0), (3, 7.5)]
    assert len({row["eval/light"] for row in lines}) > 2  # the student moves
    for line in ("the run ends after step 3 of 6: the last 2", "the student that is written is the best one: fd 7 in"):
        assert any(message.startswith(line) for message in caplog.messages)
    assert same(student, tmp_path / "checkpoint_best", 1)
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [3]
    # The last one instead, and the best one again: what is written is chosen when it is.
    student, one = run(tmp_path, [], eval_patience=2, resume=True)
    assert same(student, tmp_path / "checkpoints", 3) and not one.shapes
    student, _ = run(tmp_path, [], eval_patience=2, export_best=True, resume=True)
    assert same(student, tmp_path / "checkpoint_best", 1)


@pytest.mark.soak
def test_the_best_adapter_is_written(tmp_path: Path) -> None:
    settings = {"lora_rank": 2, "max_steps": 2, "ema_decay": 0.0}
    weights = []
    for name, numbers, more in (
        ("one", [5.0, 4.0], {"max_steps": 1}),
        ("two", [5.0, 4.0, 6.0], {"export_best": True}),
        ("two", [], {"resume": True}),
    ):
        student, _ = run(tmp_path / name, numbers, **{**settings, **more})
        weights.append(DiffusionPipeline.from_pretrained(student).unet.state_dict())
    one, best, last = weights
    assert all(torch.equal(one[name], best[name]) for name in one)
    assert any(not torch.equal(last[name], best[name]) for name in last)


def test_who_has_no_evaluator_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--eval_steps: nobody here can judge samples"):
        distill(tiny_pipelines.tiny_ddim(), "dmd2", out=str(tmp_path / "run"), **{**RUN, **EVALUATED})
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="--eval_metric kid: of these samples there are fd, light"):
        run(tmp_path / "run", [], eval_metric="kid")
    assert not (tmp_path / "run").exists()


@pytest.mark.soak
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_evaluate_the_samples_of_one(tmp_path: Path, sharding: str) -> None:
    settings = {"max_steps": 2, "export_best": True}
    one_student, one = run(tmp_path / "one", [9.0, 7.0, 8.0], **{**settings, "batch_size": 2})

    def work(rank: int) -> None:
        student, ours = run(tmp_path / "two", [9.0, 7.0, 8.0], **{**settings, "batch_size": 1}, sharding=sharding)
        assert ours.shapes == ([(3, 3, 8, 8)] * 3 if rank == 0 else [])
        if rank == 0:
            assert (ours.teacher.int() - one.teacher.int()).abs().max() <= 1
            weights = [DiffusionPipeline.from_pretrained(path).unet.state_dict() for path in (student, one_student)]
            for name, value in weights[0].items():
                torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-3)

    well(2, work, tmp_path / "said")
    lines = [
        [json.loads(line)["eval/light"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert lines[0] == pytest.approx(lines[1], abs=0.2)
