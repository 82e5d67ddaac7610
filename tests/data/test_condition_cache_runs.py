"""The cache's whole way: made by the command, trained from without a text encoder, and refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import tiny_dit, tiny_stable_diffusion

import fewstep
from fewstep.cli import main
from fewstep.programs import distillation
from fewstep.programs.methods import method_class
from fewstep.teachers.loading import load_teacher
from fewstep.training.loop import Loop
from tests.data.test_condition_cache import PROMPTS
from tests.whole_runs import whole_run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "sd"
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return str(tmp_path / "p.txt")


def settings(teacher: str, out: Path, **more: Any) -> Any:
    chosen = {"steps": 2, "max_steps": 2, "batch_size": 2, "cpu": True, "report_to": "none", "critic_updates": 1}
    return method_class("dmd2").Config(teacher=teacher, out=str(out), **{**chosen, **more})


def test_training_from_a_cache_never_calls_a_text_encoder(
    teacher: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the student is the one that is trained without a cache, text encoder and all."""
    words = [
        "cache",
        "--teacher",
        teacher,
        "--prompts",
        prompts,
        "--out",
        str(tmp_path / "c"),
        "--shard_size",
        "2",
        "--cpu",
    ]
    assert main(words) == 0
    assert main([*words, "--resume"]) == 0
    assert main(words) == 2
    assert "already holds a cache" in capsys.readouterr().err.splitlines()[-1]
    calls: list[str] = []
    in_loop: list[int] = []
    train = Loop.run

    def run(self: Loop) -> None:
        before = len(calls)
        train(self)
        in_loop.append(len(calls) - before)

    def watched(*given: Any, **named: Any) -> Any:
        pipeline = load_teacher(*given, **named)
        pipeline.text_encoder.register_forward_hook(lambda *_: calls.append("text_encoder"))
        return pipeline

    monkeypatch.setattr(Loop, "run", run)
    monkeypatch.setattr("fewstep.programs.teacher.load_teacher", watched)
    students = []
    for name, source in (("cached", {"cache": str(tmp_path / "c")}), ("encoded", {"prompts": prompts})):
        students.append(distillation.run(settings(teacher, tmp_path / name, sample_steps=0, **source), "dmd2"))
    assert in_loop == [0, 0] and calls
    cached, encoded = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} for folder in students
    )
    assert len(cached) == 3 and cached == encoded


@pytest.mark.soak
def test_sample_grids_and_lora_students_do_without_text_encoders(teacher: str, prompts: str, tmp_path: Path) -> None:
    folder = fewstep.cache(teacher, tmp_path / "c", prompts=PROMPTS, cpu=True)
    config = settings(teacher, tmp_path / "run", cache=str(folder), sample_steps=1, lora_rank=4)
    whole = whole_run(config, "dmd2")
    out = whole.folder
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert sum(parameter.numel() for parameter in whole.bench.recording.pipeline.text_encoder.parameters()) == 0


def test_bad_input_is_one_line(teacher: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fewstep.cache(teacher, tmp_path / "c", prompts=prompts, cpu=True)
    tiny_stable_diffusion("v_prediction").save_pretrained(tmp_path / "other")
    dit = tmp_path / "dit"
    tiny_dit().save_pretrained(dit)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    train = ["distill", "dmd2", "--out", str(tmp_path / "o"), "--cpu", "--report_to", "none", "--teacher"]
    make = ["cache", "--cpu", "--teacher"]
    for words, expected in (
        ([*train, str(tmp_path / "other"), "--cache", str(folder)], "its scheduler differs"),
        ([*train, str(dit), "--cache", str(folder)], "of another teacher"),
        ([*train, teacher, "--cache", str(folder), "--call", '{"negative_prompt": "b"}'], "another --call"),
        ([*train, teacher, "--cache", str(folder), "--prompts", prompts], "give --cache or"),
        ([*train, teacher, "--cache", str(tmp_path / "none")], "holds no cache"),
        ([*make, teacher, "--prompts", prompts, "--out", str(tmp_path / "full")], "not empty"),
        ([*make, teacher, "--out", str(tmp_path / "n")], "takes --prompts FILE"),
        ([*make, teacher, "--prompts", prompts, "--out", str(tmp_path / "n"), "--shard_size", "0"], "--shard_size"),
        ([*make, str(dit), "--classes", "0-1000", "--out", str(tmp_path / "n")], "1000 is not"),
        ([*make, "fashion-none", "--prompts", prompts, "--out", str(tmp_path / "n")], "fashion-none"),
    ):
        assert main(words) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
        assert len(lines) == 1 and expected in lines[0], lines
