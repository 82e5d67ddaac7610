"""``fewstep eval`` as a command: presets, and the processes of a launch."""

import json
from pathlib import Path

import pytest
from forked import well
from toy_models import tiny_dit

from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.eval.config import EvalConfig
from fewstep.eval.presets import PRESETS, with_preset


def test_two_processes_make_the_report_of_one(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "dit")
    words = ["eval", "--teacher", str(tmp_path / "dit"), "--teacher_steps", "1,2", "--classes", "0-3", "--cpu"]
    words += ["--num", "130", "--batch_size", "13", "--metrics", "saturation,speed", "--out"]
    for count in (1, 2):
        well(count, lambda _rank, count=count: main([*words, str(tmp_path / str(count))]), tmp_path / f"said_{count}")
    reports = [json.loads((tmp_path / str(count) / "report.json").read_text()) for count in (1, 2)]
    kept = ("model", "steps", "nfe", "num", "metrics", "spread", "pictures")
    one, two = ([[row[name] for name in kept] for row in report["rows"]] for report in reports)
    assert one == two and len(one) == 2 and all(row["speed"]["latency_ms"] > 0 for row in reports[1]["rows"])
    pictures = [sorted((tmp_path / str(count) / "images").rglob("*.png")) for count in (1, 2)]
    assert len(pictures[0]) == 260
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    # The table is printed once, by the first process.
    said = [(tmp_path / "said_2" / f"stderr_{rank}.txt").read_text() for rank in range(2)]
    assert "images/s" in said[0] and "images/s" not in said[1]


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_settings_of_an_evaluation(name: str) -> None:
    config = EvalConfig(**with_preset(name, {"num": None, "seed": 3, "teacher": "somewhere"}))
    assert config.num == PRESETS[name]["num"] and config.seed == 3


def test_what_a_preset_fixes_stays(tmp_path: Path) -> None:
    assert with_preset("in64-50k", {"num": 50_000})["fid_mode"] == "legacy_tensorflow"
    with pytest.raises(UserError, match="--preset in64-50k fixes num; leave it out"):
        with_preset("in64-50k", {"num": 5000})
    with pytest.raises(UserError, match="there is no preset 'in64'; there are in64-50k"):
        with_preset("in64", {})
    assert with_preset(None, {"num": 5, "steps": None}) == {"num": 5}
