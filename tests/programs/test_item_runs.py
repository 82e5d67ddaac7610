"""Runs that are asked for items: from the command line to the student, from Python, resumed, planned and probed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from item_sets import picture, tiny_editor, tiny_filler, write_items

from fewstep.cli import main
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.made_up import made_up_items
from fewstep.errors import UserError
from fewstep.programs.cache import cache
from fewstep.programs.distillation import distill
from fewstep.programs.methods import method_class
from fewstep.programs.planning.plan import Planner

SHORT = {"max_steps": 1, "steps": 2, "batch_size": 2, "cpu": True, "report_to": "none", "sample_steps": 0}
FLAGS = [word for name, value in SHORT.items() for word in (f"--{name}", str(value).lower())]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Items that a test may spoil."""
    return write_items(tmp_path / "own", 3)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_a_run_from_a_cache_ends_in_a_student_and_a_changed_picture_is_refused(
    editor: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, run = str(tmp_path / "cache"), str(tmp_path / "run")
    assert main(["cache", "--teacher", str(editor), "--items", str(own), "--out", cache, "--cpu"]) == 0
    words = ["distill", "rectified_flow", "--teacher", str(editor), "--cache", cache, *FLAGS]
    assert main([*words, "--pair_steps", "2", "--num_pairs", "2", "--out", run]) == 0
    about = json.loads((tmp_path / "run" / "student" / "fewstep.json").read_text())
    assert about["conditional"] == "item"
    assert f" --items {own} --out sample.png" in capsys.readouterr().out
    assert str(own) not in (tmp_path / "run" / "student" / "README.md").read_text(), "a place of this machine"
    picture(77).save(own.parent / "1.png")
    for told in ([], ["--items", str(own)]):
        assert main([*words, *told, "--out", str(tmp_path / "other")]) == 2
        assert "row 2 of items.jsonl is not what it was when the cache" in said(capsys)
    own.rename(own.with_name("elsewhere.jsonl"))
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "say by --items where they are" in said(capsys)


@pytest.mark.soak
def test_a_run_from_python_goes_on_with_the_same_items_alone(editor: Path, tmp_path: Path) -> None:
    given = [{"prompt": f"the {word}", "image": picture(number)} for number, word in enumerate("ab")]
    settings: dict[str, Any] = {**SHORT, "out": tmp_path / "run", "checkpointing_steps": 1}
    distill(str(editor), "dmd2", items=given, **settings)
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text())["inputs"]
    assert kept["items"][""]["sha256"]
    again = {**settings, "resume": True, "max_steps": 2}
    distill(str(editor), "dmd2", items=[dict(one) for one in given], **again)
    with pytest.raises(ValueError, match=r"--resume: --items .* is not what it was when the run"):
        distill(str(editor), "dmd2", items=[given[0], {**given[1], "image": picture(9)}], **{**again, "max_steps": 3})


def test_pairs_are_made_of_items(editor: Path, items: Path, tmp_path: Path) -> None:
    words = ["pairs", "--teacher", str(editor), "--items", str(items), "--num", "3", "--teacher_steps", "1", "--cpu"]
    assert main([*words, "--out", str(tmp_path / "pairs")]) == 0
    assert json.loads((tmp_path / "pairs" / "about.json").read_text())["conditions"]["items"]


def test_probe_makes_up_pictures_of_the_size_that_the_teacher_is_for(editor: Path, capsys) -> None:
    assert main(["probe", str(editor)]) == 0
    shown = capsys.readouterr().out
    assert "conditional on item" in shown and "[4, 8, 8] per sample" in shown


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_a_plan_is_recorded_with_items_or_with_made_up_ones(editor: Path, items: Path, named: bool) -> None:
    config = method_class("dmd2").Config(teacher=str(editor), out="", items=str(items) if named else None)
    planner = Planner(config, "dmd2")
    recording = planner.recording
    assert (recording.conditional, recording.sample_shape) == ("item", (4, 8, 8))
    assert planner.encoding.keys() == {"vae", "text_encoder"} and min(planner.encoding.values()) > 10_000
    size, text = 4 * 8 * 8 * 4, recording.marked["encoder_hidden_states"].value.nbytes
    assert planner.planned is not None and planner.planned.each == size + text, "the zeros of all are kept once"


@pytest.mark.soak
def test_a_plan_counts_the_draws_that_are_kept(tmp_path: Path) -> None:
    tiny_filler().save_pretrained(tmp_path)
    config = method_class("dmd2").Config(teacher=str(tmp_path), out="")
    one, three = (Planner(replace(config, draws=draws), "dmd2").planned for draws in (1, 3))
    assert one is not None and three is not None and three.each == 3 * one.each


@pytest.mark.soak
def test_a_plan_of_items_is_made_whole(editor: Path, items: Path, capsys) -> None:
    assert main(["plan", str(editor), "dmd2", "--items", str(items), "--batch_size", "1"]) == 0
    shown = capsys.readouterr().out
    assert "[4, 8, 8] per sample" in shown and "\nencoders       estimated: vae " in shown
    assert "\nitem           computed: " in shown and " kB for each, encoded and cached" in shown


def test_made_up_pictures_are_the_same_each_time_and_no_more_than_need_be() -> None:
    pipeline = tiny_editor()
    (one,), (again,) = (list(made_up_items(pipeline, {})) for _ in range(2))
    assert one == again and one[0] != one[1] and one[0].arguments["image"].size == (16, 16)
    assert next(made_up_items(pipeline, {"height": 24, "width": 8}))[0].arguments["image"].size == (8, 24)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "image": "none.png"}, "row 2 of items.jsonl: image: there is no file"),
        ({"prompt": "a", "image": "0.png", "style": "b"}, "row 2 of items.jsonl has the column style"),
        ({"prompt": "a"}, "row 2 of items.jsonl has no image, unlike row 1"),
        ({"prompt": "b", "image": "0.png"}, "no two rows have different pictures"),
    ],
)
def test_a_row_that_cannot_be_meant_is_one_line_and_exit_code_two(
    editor: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], words: str
) -> None:
    own.write_text("\n".join(json.dumps(one) for one in ({"prompt": "a", "image": "0.png"}, row)))
    before = sorted(tmp_path.rglob("*"))
    assert main(["cache", "--teacher", str(editor), "--items", str(own), "--out", str(tmp_path / "c"), "--cpu"]) == 2
    assert words in said(capsys) and sorted(tmp_path.rglob("*")) == before


def test_a_cache_that_is_refused_while_it_encodes_leaves_nothing_in_the_mended_ones_way(tmp_path: Path) -> None:
    given = [{"prompt": f"the {word}", "image": picture(number)} for number, word in enumerate("abc")]
    spoilt = [*given[:2], {**given[2], "image": torch.full((1, 3, 16, 16), torch.nan)}]
    with pytest.raises(UserError, match=r"^item 3: "):
        cache(tiny_editor(), tmp_path / "cache", items=spoilt, cpu=True)
    assert not (tmp_path / "cache").exists()
    assert len(ConditionCache(cache(tiny_editor(), tmp_path / "cache", items=given, cpu=True))) == 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--call", '{"image": "0.png"}'], "the call has image, and a picture is of one sample: give it by --items"),
        (["--items", "x.jsonl", "--prompts", "y.txt"], "give --prompts or --items, not both"),
        (["--items", "x.csv"], "--items takes a .jsonl or .parquet file"),
    ],
)
def test_what_cannot_go_together_is_named(editor: Path, tmp_path: Path, capsys, flags: list[str], words: str) -> None:
    assert main(["distill", "dmd2", "--teacher", str(editor), "--out", str(tmp_path / "run"), *FLAGS, *flags]) == 2
    assert words in said(capsys) and not (tmp_path / "run").exists()
