"""The script for a GPU: time boxes, what was not reached, and a machine without one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fewstep.eval.bench import gpu


def words(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_box_ends_in_time_and_keeps_what_it_has(tmp_path: Path) -> None:
    boxes = {
        "quick": (words("print('{\"a\": 1}')"), 60.0),
        "slow": (words("import time; print('{\"b\": 2}', flush=True); time.sleep(60)"), 2.0),
        "wrong": (words("raise SystemExit(3)"), 60.0),
    }
    found = gpu.run_boxes(boxes, 60.0, tmp_path)
    assert {name: about["numbers"] for name, about in found["boxes"].items()} == {
        "quick": [{"a": 1}],
        "slow": [{"b": 2}],
        "wrong": [],
    }
    states = [about["state"] for about in found["boxes"].values()]
    assert states[:2] == ["done", "ended by its time box"] and states[2].startswith("failed with code 3")
    assert found["not_reached"] == ["slow in part"]


def test_what_finds_no_time_is_listed(tmp_path: Path) -> None:
    assert gpu.run_boxes({"late": (words(""), 60.0)}, 0.0, tmp_path) == {"boxes": {}, "not_reached": ["late"]}


def test_the_order_is_that_of_the_goals_and_all_fit_in_ten_minutes_but_the_last() -> None:
    assert [name.partition("(")[2].rstrip(")") for name in gpu.BOXES][:5] == ["14", "16", "15", "12", "11"]
    assert sum(seconds for _, seconds in list(gpu.BOXES.values())[:-1]) <= gpu.TOTAL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_skipped_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "gpu-bench is skipped: there is no GPU that torch can use\n"
    assert not (tmp_path / "out").exists()
