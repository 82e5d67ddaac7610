"""The whole evaluation of pipelines of four kinds, with toy extractors: on one process, on two, and after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import forked, well
from toy_models import ToyExtractor

from fewstep.eval import Report, evaluate, samples, viewers
from fewstep.eval.features import Features
from fewstep.eval.sources import ModelSource
from fewstep.training.distributed import Processes, join_launch

KINDS: dict[str, dict[str, Any]] = {
    "StableDiffusion": {"prompts": ("a boot", "a hat")},
    "Wan": {"prompts": ("a boot", "a hat"), "teacher_call": {"num_frames": 5, "height": 16, "width": 16}},
    "DiT": {"classes": (0, 1)},
    "DDIM": {"unconditional": True},
}
OPTIONS = {"num": 18, "batch_size": 8, "teacher_steps": (1, 2), "columns": 3, "latency_calls": 1, "device": "cpu"}


class AnySize(ToyExtractor):
    """Takes whatever comes, at 4 x 4."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return True

    def __call__(self, images: Any) -> Features:
        made = super().__call__(images)
        return Features(made.features, None)


def run(zoo: Path, kind: str, out: Path, processes: Processes | None = None, **more: Any) -> Report:
    options = {**OPTIONS, **KINDS[kind], "out": out, **more}
    options["teacher_call"] = {**KINDS[kind].get("teacher_call", {}), "num_inference_steps": 2}
    extractors = {"dino": AnySize(), "inception": AnySize()}
    return evaluate([], teacher=str(zoo / kind), extractors=extractors, processes=processes, **options)


def numbers(out: Path) -> list[Any]:
    content = json.loads((out / "report.json").read_text())
    return [[row[name] for name in ("model", "steps", "nfe", "metrics", "spread")] for row in content["rows"]]


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.soak] * (k in ("StableDiffusion", "Wan"))) for k in KINDS]
)
def test_the_whole_evaluation(zoo: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (samples, viewers):  # chunks that are worth a kill
        monkeypatch.setattr(module, "BLOCK", 8)
    report = run(zoo, kind, tmp_path / "one")
    assert [row["steps"] for row in report.rows[:2]] == [1, 2]
    for row in report.rows:
        assert {"fid", "kid", "fd_dino", "precision", "recall", "density", "coverage", "diversity"} <= set(
            row["metrics"]
        )
        assert row["speed"]["latency_ms"] > 0 and len(row["pictures"]) == 3
    assert report.measures["fid"].title == "FD-toy" and "with other seeds" in report.measures["fid"].reference
    said = {sentence.split(" is skipped: ")[0] for sentence in report.skipped}
    assert {"cmmd", "aesthetic"} <= said and not said & {"fid", "kid", "fd_dino", "diversity", "agreement", "fd_test"}

    def on_two(rank: int) -> None:
        launch = join_launch(cpu=True)
        processes = Processes(launch.process_index, launch.num_processes)
        run(zoo, kind, tmp_path / "two", processes, metrics=("fid", "kid", "fd_dino", "prdc", "diversity"))

    well(2, on_two, tmp_path / "said")

    def killed(rank: int) -> None:
        made, inner = [], ModelSource.make

        def make(self: ModelSource, indices: Any) -> Any:
            made.append(len(indices))
            if sum(made) > 20:  # in the second row
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(self, indices)

        ModelSource.make = make
        run(zoo, kind, tmp_path / "killed")

    (end,) = forked(1, killed, tmp_path / "killed_said")
    assert end.code == -signal.SIGKILL
    run(zoo, kind, tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "one")
    kept = set(report.rows[0]["metrics"]) & {"fid", "kid", "fd_dino", "precision", "recall", "density", "coverage"}
    for one, two in zip(report.rows, Report.load(tmp_path / "two" / "report.json").rows, strict=True):
        assert {name: one["metrics"][name] for name in kept} == {name: two["metrics"][name] for name in kept}
        assert one["nfe"] == two["nfe"]
