"""``auto``: from a teacher and shared settings to a method, its settings, and the command that means the same."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import SCMScheduler

import fewstep
from fewstep.cli import main
from fewstep.cli.distill import auto_settings, distill_config
from fewstep.errors import UserError
from fewstep.programs import auto
from fewstep.programs.auto import Decision, decide
from fewstep.programs.choice import Candidate, Evidence
from tests import tiny_pipelines
from tests.programs.test_choice import measured

RECIPE = {"lr": 2e-4, "batch_size": 64, "critic_lr": 4e-4, "gan_weight": 0.03, "renoise": "ode", "max_steps": 520}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teachers") / "ddim"
    tiny_pipelines.tiny_ddim().save_pretrained(folder)
    return str(folder)


def chosen(*candidates: Candidate, pipeline: Any = None, **given: Any) -> Decision:
    return decide({"teacher": "fashion-flow", "out": "o", **given}, pipeline, Evidence(1.0, candidates))


def test_the_embedded_teacher_gets_the_recipe_of_its_cell() -> None:
    decision = chosen(measured("dmd2", 0.6, images=True, settings=RECIPE), data="fashion")
    assert decision.method == "dmd2"
    settings = decision.config.as_dict()
    assert {name: settings[name] for name in RECIPE} == RECIPE
    assert (settings["steps"], settings["data"]) == (4, "fashion")
    assert "dmd2, with real images, for a flow-matching teacher at 4 steps: 0.60 times the FD" in decision.why[0]
    assert decision.why[1:] == ("auto: the settings are those of that cell",)


def test_another_teacher_gets_the_form_and_the_methods_own_numbers(teacher: str) -> None:
    decision = chosen(measured("dmd2", 0.6, kind="table", images=True, settings=RECIPE), teacher=teacher, data="d")
    defaults = distill_config("dmd2", ["--teacher", teacher, "--out", "o"]).as_dict()
    differing = {name: value for name, value in decision.config.as_dict().items() if value != defaults[name]}
    assert differing == {"data": "d", "gan_weight": 0.03, "renoise": "ode"}
    assert any("two teachers of a few million parameters" in line for line in decision.why)
    assert not any("guided" in line for line in decision.why)


def test_a_guidance_of_the_cell_is_named_and_not_taken(teacher: str) -> None:
    weaker = measured("dmd2", 0.6, kind="table", images=True, settings={**RECIPE, "guidance_scale": 2.0})
    decision = chosen(weaker, teacher=teacher, data="d")
    assert decision.config.guidance_scale is None
    assert any("guided by 2, less than by its own call" in line for line in decision.why)


def test_what_is_asked_for_wins_and_what_follows_from_it_follows() -> None:
    recipe = {"lr": 2e-4, "critic_lr": 4e-4, "max_steps": 560, "phase_steps": 280, "critic_updates": 4}
    row = measured("phased_dmd", 0.6, settings=recipe)
    assert chosen(row).config.phase_steps == 280
    config = chosen(row, max_steps=100, lr=1e-5, steps=3, lora_rank=4).config
    assert (config.max_steps, config.lr, config.steps, config.lora_rank, config.critic_updates) == (100, 1e-5, 3, 4, 4)
    assert (config.phase_steps, config.critic_lr) == (None, None)


def test_the_command_that_is_printed_means_the_same(tmp_path: Path) -> None:
    row = measured("consistency", 0.6, settings={"variant": "cd", "target_decay": 0.95, "intervals": 20})
    given = {"call": {"height": 8}, "negative_prompt": "a 'b' c", "variant": "fp16", "cpu": True, "shift": None}
    (tmp_path / "model_index.json").write_text('{"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}')
    tiny_pipelines.tiny_flow().scheduler.save_pretrained(tmp_path / "scheduler")
    decision = chosen(row, teacher=str(tmp_path), **given)
    program, command, method, *words = shlex.split(decision.command)
    assert (program, command, method) == ("fewstep", "distill", "consistency")
    assert distill_config(method, words) == decision.config
    assert (decision.config.variant, decision.config.teacher_variant) == ("cd", "fp16")


def test_images_are_left_out_where_the_best_needed_none() -> None:
    """A rectified flow would invert them, and be another method than the measured one."""
    decision = chosen(measured("rectified_flow", 0.6), data="fashion", data_workers=1)
    assert decision.config.data is None and decision.config.data_workers == 2
    assert "--data" not in decision.command
    assert "auto: this was best without images, so --data is left out" in decision.why


def test_what_images_would_change_is_said() -> None:
    rows = measured("dmd2", 0.5, images=True), measured("sid", 0.6)
    assert "auto: with real images (--data) it would be dmd2, 0.50 times" in chosen(*rows).why
    assert not any("--data" in line for line in chosen(rows[1]).why)


def test_steps_that_were_not_measured_are_said() -> None:
    assert (
        "auto: nothing was measured at 3 steps; this is the choice at 4 steps"
        in chosen(measured("sid", 1), steps=3).why
    )


def test_a_method_that_does_not_take_the_settings_is_passed_over() -> None:
    decision = chosen(measured("rectified_flow", 0.5), measured("sid", 0.6), renoise="fresh")
    assert decision.method == "sid"
    assert decision.why[-1].startswith("auto: passed over rectified_flow: --renoise must be ode")
    with pytest.raises(UserError, match="renoise must be ode for a rectified flow"):
        chosen(measured("rectified_flow", 0.5), measured("mean_flow", 0.6), renoise="fresh")


def test_an_edm_teacher_is_told_that_none_was_measured() -> None:
    pipeline = tiny_pipelines.tiny_edm()
    decision = chosen(measured("sid", 0.6), pipeline=pipeline, teacher="edm")
    assert "auto: no EDM teacher was measured; this is the choice for flow-matching teachers" in decision.why
    pipeline.scheduler = SCMScheduler()
    with pytest.raises(UserError, match="--teacher edm is of no kind that auto knows: SCMScheduler"):
        chosen(measured("sid", 0.6), pipeline=pipeline, teacher="edm")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"alpha": 1.0}, "--alpha is no flag that all methods share, and auto takes those alone"),
        ({"teacher": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"teacher": "edm"}, "does not exist"),
    ],
)
def test_mistakes(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(measured("sid", 0.6), **given)


def test_nothing_measured_is_said() -> None:
    with pytest.raises(UserError, match="no method was measured for a flow-matching teacher; name one"):
        chosen(measured("sid", 0.6, kind="table"))


# --- the commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "fewstep: --steps must be at least 1, not 0"),
        (["--alpha", "1"], "fewstep: --alpha is no flag that all methods share"),
        (["--steps", "x"], "fewstep: --steps takes a whole number, not 'x'"),
        (["--config", "CONFIG"], "is of a run of sid: start fewstep distill sid"),
    ],
)
def test_bad_words_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.yaml").write_text("method: sid\n")
    words = [word.replace("CONFIG", str(tmp_path / "c.yaml")) for word in words]
    assert main(["distill", "auto", "--teacher", "fashion-flow", "--out", str(tmp_path / "o"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_only_what_is_given_is_asked_for(tmp_path: Path) -> None:
    """A default of auto's own flags would win over the recipe."""
    (tmp_path / "c.yaml").write_text("lr: 1.0e-5\nsteps: 2\n")
    words = ["--teacher", "t", "--out", "o", "--config", str(tmp_path / "c.yaml"), "--steps", "3", "--resume"]
    assert auto_settings(words) == {"teacher": "t", "out": "o", "lr": 1e-5, "steps": 3, "resume": True}


def test_a_run_is_its_methods_and_goes_on_with_it(
    teacher: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be chosen when it goes on: what ships may have changed since."""
    out = tmp_path / "run"
    words = ["distill", "auto", "--teacher", teacher, "--out", str(out), "--cpu", "--report_to", "none"]
    words += ["--sample_steps", "0", "--batch_size", "1", "--steps", "1"]
    monkeypatch.setattr(auto, "shipped_evidence", lambda: Evidence(1.0, (measured("dmd2", 1.0, kind="table"),)))
    with caplog.at_level("INFO", "fewstep"):
        assert main([*words, "--max_steps", "1"]) == 0
    (line,) = [line for line in caplog.messages if line.startswith("auto stands for: ")]
    assert line.startswith(f"auto stands for: fewstep distill dmd2 --teacher {teacher} --out {out} --steps 1")
    assert any(
        message.startswith("auto: dmd2, without images, for a teacher with a table") for message in caplog.messages
    )
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == "dmd2"
    assert json.loads((out / "student" / "fewstep.json").read_text())["method"] == "dmd2"
    assert "dmd2" in (out / "student" / "README.md").read_text()
    monkeypatch.setattr(auto, "shipped_evidence", lambda: Evidence(1.0, (measured("sid", 1.0, kind="table"),)))
    with caplog.at_level("INFO", "fewstep"):
        assert main([*words, "--max_steps", "2", "--resume"]) == 0
    assert f"auto goes on with dmd2, which {out} is a run of" in caplog.messages
    assert yaml.safe_load((out / "config.yaml").read_text())["max_steps"] == 2
    assert (out / "checkpoints").is_dir()


class PlannedError(Exception):
    """Raised in the place of planning."""


def test_a_plan_of_auto_is_that_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python and on the command line; what it would take is planned as for any method."""
    asked: list[Any] = []

    def note(config: Any, method: str, **_: Any) -> None:
        asked.append((method, config.batch_size, config.steps, config.lr))
        raise PlannedError

    rows = (measured("sid", 1.0, settings={"lr": 2e-4, "batch_size": 64}),)
    monkeypatch.setattr(auto, "shipped_evidence", lambda: Evidence(1.0, rows))
    # The command first: a module that is imported while the other is replaced would keep the replacement.
    for place in ("fewstep.cli.plan", "fewstep.programs.planning.plan"):
        monkeypatch.setattr(f"{place}.Planner", note)
    with pytest.raises(PlannedError):
        fewstep.plan("fashion-flow", "auto", batch_size=2)
    with pytest.raises(PlannedError):
        main(["plan", "fashion-flow", "auto", "--memory", "24GB", "--steps", "3"])
    assert asked == [("sid", 2, 4, 2e-4), ("sid", 64, 3, 2e-4)]
