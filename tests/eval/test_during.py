"""What samples are judged by while a student trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.eval.during import evaluator_of
from fewstep.fashion import PROMPTS
from fewstep.training import checkpoint

RUN = "--steps 1 --max_steps 2 --batch_size 4 --log_steps 1 --sample_steps 0 --report_to none --cpu true --lr 1e-3"


def config(teacher: str = "fashion-flow", **settings) -> RunConfig:
    return RunConfig(teacher=teacher, out="o", eval_steps=1, **settings)


def pictures(count: int = 20, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_embedded_teachers_are_judged_by_their_classifier_against_real_images() -> None:
    one = evaluator_of(config(), torch.device("cpu"))
    assert one.teacher_samples() == 0 and next(iter(one.best)) == "fd_test"
    numbers = one(pictures(), [PROMPTS[index % 10] for index in range(20)])
    assert list(numbers) == list(one.best) == ["fd_test", "agreement", "diversity"]
    assert numbers["fd_test"] > 10 and 0 <= numbers["agreement"] <= 1 and numbers["diversity"] >= 0
    assert list(one(pictures(), ["a red shoe"] * 20)) == ["fd_test"]
    assert list(one(pictures(4), list(PROMPTS[:4]))) == ["fd_test", "agreement"]  # no class has two samples
    with pytest.raises(UserError, match="judges no pictures of 3x64x64; leave it out"):
        one(pictures(size=64), PROMPTS)


def test_a_run_has_its_curve_and_writes_its_best_student(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "run"
    words = ["--teacher", "fashion-flow", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), *RUN.split()]
    words += ["--eval_steps", "1", "--eval_samples", "12", "--eval_metric", "agreement", "--export_best", "true"]
    assert main(["distill", "consistency", *words]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["eval/agreement"] for row in lines}
    assert list(curve) == [0, 1, 2] and all(row["eval/fd_test"] > 0 for row in lines)
    best = json.loads((out / "checkpoint_best" / "best.json").read_text())
    assert best["value"] == max(curve.values()) == curve[best["step"]]
    assert best["evaluator"] == "fashion-classifier-64 beside the 10,000 test images of Fashion-MNIST"
    found = checkpoint.find_step(out / "checkpoint_best", best["step"]).tensors()["student"]
    network = fewstep.load(out / "student").transformer.state_dict()
    for name, value in found.items():  # it was rounded to the teacher's precision
        torch.testing.assert_close(network[name.removeprefix("network.")].float(), value, rtol=1e-3, atol=1e-5)


def test_what_nobody_can_judge_is_told_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher", "somebody/else", "--eval_steps", "1", "--out", str(tmp_path / "run")]
    assert main(["distill", "dmd2", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "--eval_steps judges samples of" in said[0]
    words[1] = "fashion-sd"
    assert main(["distill", "dmd2", *words, "--eval_metric", "fid"]) == 2
    assert "--eval_metric fid: of these samples there are fd_test, agreement" in capsys.readouterr().err
    with pytest.raises(UserError, match="--eval_steps judges samples of"):
        fewstep.distill("somebody/else", eval_steps=1, out=str(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())
