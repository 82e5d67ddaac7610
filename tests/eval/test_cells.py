"""The cells of all methods: the declared list, what binds a result to its recipe, and what is kept of a cell."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import UserError
from fewstep.eval.benchmark import cells as cells_module
from fewstep.eval.benchmark.cell_results import Result, read_result, read_strip, state, why_stale, write_result
from fewstep.eval.benchmark.cells import Cell, Training, digest, read_plan
from fewstep.fashion import TEACHERS

TRAINING = Training("dmd2", "dmd2", "fashion-sd", 4, settings={"gan_weight": 0.0, "max_steps": 2})


def cell(**changes: Any) -> Cell:
    return dataclasses.replace(Cell("fashion-sd", 4, 20, TRAINING), **changes)


def result(of: Cell, fd: float = 1.0, nfe: float = 4) -> Result:
    content = of.content()
    numbers = {"fd_test": fd, "agreement": 0.9, "recall": 0.5}
    seconds = {"training": 100, "evaluation": 10}
    calls = {"student": {"no_grad": 1000, "to_parameters": 2000}} if of.training is not None else {}
    return Result(of.name, of.seed, of.num, nfe, numbers, seconds, calls, {"cpu": "AVX2"}, 1, content, digest(content))


# --- the list ---------------------------------------------------------------------------------------------------


def test_every_declared_training_can_be_configured() -> None:
    plan = read_plan()
    for training in plan.trainings:
        config = training.config(0)
        assert max(training.at) <= config.steps == training.steps
        assert config.teacher == training.teacher


def test_cells_have_names_of_their_own() -> None:
    cells = read_plan().cells([0, 1])
    names = [one.file for one in cells]
    assert len(set(names)) == len(names)
    assert sum(one.training is None for one in cells) == 3 * len(read_plan().teacher_steps)


def test_all_teachers_and_all_methods_are_listed() -> None:
    listed = {training.method for training in read_plan().trainings}
    shipped = {Path(str(path)) for path in files("fewstep.trainers").iterdir()}
    assert listed == {path.stem for path in shipped if path.suffix == ".py" and not path.stem.startswith("_")}
    assert {training.teacher for training in read_plan().trainings} == TEACHERS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num: 5", "is no list of cells"),
        ("{num: 5, teacher_steps: [1], trainings: [{name: a, method: dmd2, teacher: x, steps: 1}]}", "no embedded"),
        ("{num: 5, teacher_steps: [1], trainings: [{nam: a}]}", "nam"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "list.yaml")


def test_a_training_listed_twice_is_refused(tmp_path: Path) -> None:
    entry = "{name: dmd2, method: dmd2, teacher: fashion-sd, steps: 1}"
    (tmp_path / "list.yaml").write_text(f"{{num: 5, teacher_steps: [1], trainings: [{entry}, {entry}]}}")
    with pytest.raises(UserError, match="dmd2_fashion-sd_1 twice"):
        read_plan(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (Training("a", "dmd2", "fashion-sd", 1, settings={"no_such": 1}), "no such setting"),
        (Training("a", "dmd2", "fashion-sd", 1, settings={"lr": -1}), "--lr must not be negative"),
        (Training("a", "none", "fashion-sd", 1), "there is no recipe none_fashion_sd.yaml"),
    ],
)
def test_a_wrong_training_is_refused(training: Training, message: str) -> None:
    with pytest.raises(UserError, match=message):
        training.config(0)


# --- the hash ---------------------------------------------------------------------------------------------------


def test_the_hash_knows_recipe_and_overrides_teacher_and_judge() -> None:
    base = digest(cell().content())
    changed = [
        cell(training=dataclasses.replace(TRAINING, settings={**TRAINING.settings, "max_steps": 3})),
        cell(training=dataclasses.replace(TRAINING, settings={**TRAINING.settings, "lr": 1e-3})),
        cell(training=dataclasses.replace(TRAINING, teacher="fashion-flow")),
        cell(num=21),
        cell(steps=2),
    ]
    assert len({base, *(digest(one.content()) for one in changed)}) == len(changed) + 1


def test_the_hash_knows_neither_machine_nor_what_is_only_watched() -> None:
    watched = {"log_steps": 1, "checkpointing_steps": 1, "sample_steps": 0, "cpu": True}
    other = dataclasses.replace(TRAINING, settings={**TRAINING.settings, **watched})
    assert digest(cell(training=other).content()) == digest(cell().content())
    assert digest(cell(seed=1).content()) == digest(cell().content())


def test_the_hash_knows_the_settings_that_it_knew_before_they_had_kinds() -> None:
    unknown = {"teacher", "out", "seed", "resume", "cpu", "report_to", "push_to_hub", "hub_private"}
    unknown |= {"checkpointing_steps", "checkpoints_total_limit", "log_steps", "sample_steps", "stop_on", "rollbacks"}
    unknown |= {"eval_steps", "eval_samples", "eval_metric", "eval_weights"}
    unknown |= {"sharding", "sharding_group", "sharding_offload", "data_workers"}
    unknown |= {"attention_backend", "compile", "lora_walks", "sequential_guidance"}
    unknown |= {"reward_beside", "reward_look_steps", "reward_files"}
    assert TRAINING.content()["settings"].keys() == TRAINING.config(0).as_dict().keys() - unknown


def test_the_hash_knows_the_pictures_that_a_teacher_is_shown() -> None:
    """Training pictures those of the items that a student learns from, held-back ones those that it is judged by."""
    shown = Training("dmd2", "dmd2", "fashion-inpaint", 4, settings={"data": "targets"})
    known, asked = shown.content(), Cell("fashion-inpaint", 4, 20, shown).content()["evaluation"]
    assert known["images"] == cells_module._file("training_images.npz")
    assert asked["pictures"] == cells_module._file("held_back_images.npz")
    assert "images" not in TRAINING.content() and "pictures" not in cell().content()["evaluation"]


def test_the_hash_knows_the_teachers_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(json.dumps(cells_module.manifest()))
    facts["files"]["fashion-sd/unet/diffusion_pytorch_model.safetensors"]["sha256"] = "0" * 64
    monkeypatch.setattr(cells_module, "manifest", lambda: facts)
    changed = digest(cell().content())
    monkeypatch.undo()
    assert changed != digest(cell().content())


# --- what is kept -----------------------------------------------------------------------------------------------


def test_a_cell_is_missing_done_and_stale(tmp_path: Path) -> None:
    one = cell()
    assert state(tmp_path, one) == "missing"
    write_result(tmp_path, one, result(one), None)
    assert state(tmp_path, one) == "done"
    assert read_result(tmp_path, one) == result(one)
    later = cell(training=dataclasses.replace(TRAINING, settings={**TRAINING.settings, "max_steps": 3, "lr": 1e-3}))
    assert state(tmp_path, later) == "stale"
    why = why_stale(later, result(one))
    assert why is not None and "\n" not in why
    assert "settings.lr was 0.0001 and is 0.001; settings.max_steps was 2 and is 3. Run make methods" in why


def test_a_setting_that_was_invented_since_makes_nothing_stale() -> None:
    recorded = result(cell())
    without = {**recorded.content, "settings": {k: v for k, v in recorded.content["settings"].items() if k != "shift"}}
    old = dataclasses.replace(recorded, content=without, hash=digest(without))
    assert why_stale(cell(), old) is None
    used = dataclasses.replace(TRAINING, settings={**TRAINING.settings, "shift": 2.0})
    assert "settings.shift was None and is 2.0" in (why_stale(cell(training=used), old) or "")


def test_a_result_changed_by_hand_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, cell(), result(cell()), None)
    path = tmp_path / f"{cell().file}.json"
    path.write_text(path.read_text().replace('"max_steps": 2', '"max_steps": 9'))
    with pytest.raises(UserError, match="does not fit its own hash"):
        state(tmp_path, cell())
    path.write_text("{}")
    with pytest.raises(UserError, match="is no result of a cell"):
        state(tmp_path, cell())


def test_a_strip_comes_back_as_it_was(tmp_path: Path) -> None:
    grey = torch.randint(0, 256, (10, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_result(tmp_path, cell(), result(cell()), grey)
    assert torch.equal(read_strip(tmp_path, cell(seed=1)), grey)
    assert read_strip(tmp_path, cell(steps=2)) is None
