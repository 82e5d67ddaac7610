"""What samples are judged by while a student trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_models import ToyExtractor

import fewstep
from fewstep.cli import main
from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.eval import during
from fewstep.eval.during import evaluator_of
from fewstep.eval.metrics.kid import kid
from fewstep.fashion import PROMPTS
from fewstep.training import checkpoint
from tests.tiny_pipelines import tiny_dit

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
    with pytest.raises(UserError, match="does not take images of 64x64 pixels; leave it out"):
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


def test_what_nobody_can_judge_is_told_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    words = ["--teacher", "somebody/else", "--eval_steps", "1", "--out", str(tmp_path / "run")]
    assert main(["distill", "dmd2", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "missing (DINOv2 ViT-L/14" in said[0] and "folder of --eval_weights or $FEW" in said[0]
    assert main(["distill", "dmd2", *words, "--eval_weights", str(tmp_path / "none")]) == 2
    assert "--eval_weights is no folder" in capsys.readouterr().err
    words[1] = "fashion-sd"
    assert main(["distill", "dmd2", *words, "--eval_metric", "fid"]) == 2
    assert "--eval_metric fid: of these samples there are fd_test, agreement" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--eval_steps: dinov2_vitl14_pretrain\.pth is missing"):
        fewstep.distill("somebody/else", eval_steps=1, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_teachers_are_judged_beside_their_own_samples_which_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(during, "open_extractor", lambda *_: ToyExtractor())
    run = {"steps": 2, "batch_size": 4, "log_steps": 1, "sample_steps": 0, "report_to": "none", "cpu": True}
    run |= {"eval_steps": 1, "eval_samples": 6, "lr": 1e-2, "out": str(tmp_path / "run"), "classes": "0-2"}
    fewstep.distill(tiny_dit(), "dmd2", max_steps=1, **run)
    kept = tmp_path / "run" / during.REFERENCE
    features = load_file(kept)["features"]
    assert features.shape == (6, 6)
    stamp = kept.stat().st_mtime_ns
    fewstep.distill(tiny_dit(), "dmd2", max_steps=2, resume=True, **run)
    assert kept.stat().st_mtime_ns == stamp
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [0, 1, 2] and len({row["eval/kd_dino"] for row in lines}) > 1
    assert {"eval/precision", "eval/recall", "eval/diversity"} <= lines[0].keys()

    again = during.evaluator_of(config("else", eval_samples=6), torch.device("cpu"))
    assert again.teacher_samples() == 6 and next(iter(again.best)) == "kd_dino"
    again._kept = tmp_path / "other.safetensors"
    again.show_teacher(pictures(6, 16), None)
    theirs = load_file(again._kept)["features"]
    ours = ToyExtractor()(pictures(8, 16)[:6].flip(3)).features
    assert again(pictures(8, 16)[:6].flip(3), None)["kd_dino"] == pytest.approx(kid(ours, theirs)[0], rel=1e-9)
    kept.write_bytes(b"damaged")
    again._reference, again._kept = None, kept
    assert again.teacher_samples() == 6
