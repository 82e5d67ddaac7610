"""A run's folder: claimed once, resumed only with the settings that its weights depend on."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.trainers._consistency_config import ConsistencyConfig
from fewstep.training import run_folder
from fewstep.training.run_folder import check_folder, write_config


def config(out: Path, **settings) -> RunConfig:
    return RunConfig(teacher="t", out=str(out), **settings)


def claimed(out: Path) -> Path:
    assert not check_folder(out, "dmd2", config(out))
    write_config(out, "dmd2", config(out))
    return out


def test_a_new_folder_is_made_and_its_settings_are_kept(tmp_path: Path):
    out = claimed(tmp_path / "deep" / "run")
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert (kept["method"], kept["teacher"], kept["lr"]) == ("dmd2", "t", 1e-5)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_afresh(tmp_path: Path):
    out = claimed(tmp_path)
    assert not check_folder(out, "dmd2", config(out, resume=True))
    (out / "checkpoints" / "step_00000000").mkdir(parents=True)
    assert check_folder(out, "dmd2", config(out, resume=True))


def test_settings_that_no_weight_depends_on_may_change(tmp_path: Path):
    out = claimed(tmp_path)
    changed = {
        "max_steps": 7,
        "log_steps": 3,
        "checkpointing_steps": 9,
        "checkpoints_total_limit": 4,
        "sample_steps": 2,
    }
    check_folder(out, "dmd2", config(out, resume=True, **changed))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 1.0), ("seed", 3), ("batch_size", 5), ("gradient_accumulation_steps", 2), ("steps", 2), ("ema_decay", 0.5)],
)
def test_any_other_setting_is_named_and_refused(tmp_path: Path, name: str, value: object):
    out = claimed(tmp_path)
    with pytest.raises(UserError, match=f"--resume: {name} differ"):
        check_folder(out, "dmd2", config(out, resume=True, **{name: value}))


def test_both_values_are_said_of_a_single_setting_which_may_follow_from_another(tmp_path: Path):
    out = claimed(tmp_path)
    with pytest.raises(UserError, match=r"steps differ from \S+config.yaml \(4 there, 2 here\); give"):
        check_folder(out, "dmd2", config(out, resume=True, steps=2))


def test_fewer_steps_than_a_run_has_taken_are_refused(tmp_path: Path):
    """Its student would be written as one of so few."""
    out = claimed(tmp_path)
    (out / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert check_folder(out, "dmd2", config(out, resume=True, max_steps=5))
    with pytest.raises(UserError, match=r"--max_steps 4: the run in .* is at step 5 already; give no fewer"):
        check_folder(out, "dmd2", config(out, resume=True, max_steps=4))


def test_a_curriculum_that_follows_the_number_of_steps_keeps_it(tmp_path: Path):
    """iCT would fall back from its finest grid to one that it left long ago."""
    settings = {"teacher": "t", "out": str(tmp_path / "run"), "data": "d", "variant": "ict", "ema_decay": 0.5}
    first = ConsistencyConfig(**settings, max_steps=400)
    check_folder(tmp_path / "run", "consistency", first)
    write_config(tmp_path / "run", "consistency", first)
    with pytest.raises(UserError, match="--resume: max_steps differ"):
        check_folder(tmp_path / "run", "consistency", ConsistencyConfig(**settings, max_steps=500, resume=True))


def test_a_folder_that_an_earlier_version_claimed_is_gone_on_with(tmp_path: Path):
    """It wrote down what follows from the settings, and so does this one."""
    given = {"teacher": "t", "out": str(tmp_path), "data": "d", "variant": "ict", "ema_decay": 0.5}
    write_config(tmp_path, "consistency", ConsistencyConfig(**given))
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    written = {"renoise": "fresh", "solver": "none", "distance": "pseudo_huber_norm", "huber_c": None}
    written |= {"weighting": "1/(t-r)", "target_decay": 0.0, "first_levels": 10, "last_levels": 1280, "intervals": None}
    assert {name: kept[name] for name in written} == written
    assert not check_folder(tmp_path, "consistency", ConsistencyConfig(**given, resume=True))
    del kept["method"]
    assert not check_folder(tmp_path, "consistency", ConsistencyConfig(**{**kept, "resume": True}))


def test_what_a_resumed_run_may_change(tmp_path: Path):
    """The names before settings had kinds, and a later one; cpu is not among them: a run stays on its device."""
    names = {"out", "merge", "push_to_hub", "hub_private", "max_steps", "resume", "report_to"}
    names |= {
        "checkpointing_steps",
        "checkpoints_total_limit",
        "log_steps",
        "sample_steps",
        "export_dtype",
        "data_workers",
        "attention_backend",
        "compile",
        "lora_walks",
        "sequential_guidance",
        "sharding",
        "sharding_group",
        "sharding_offload",
        "stop_on",
        "rollbacks",
        "eval_steps",
        "eval_samples",
        "eval_metric",
        "eval_patience",
        "eval_weights",
        "export_best",
    }
    assert run_folder._may_change(config(tmp_path)) == names
    curriculum = ConsistencyConfig(teacher="t", out=str(tmp_path), data="d", variant="ict")
    assert run_folder._may_change(curriculum) == names - {"max_steps"}


def test_another_method_is_refused(tmp_path: Path):
    out = claimed(tmp_path)
    with pytest.raises(UserError, match="--resume: method differ"):
        check_folder(out, "sid", config(out, resume=True))


def test_a_run_that_could_not_be_begun_leaves_a_folder_that_can(tmp_path: Path):
    """The disk was full while the configuration was written."""
    (tmp_path / ".config.yaml.partial").write_text("teach")
    assert not check_folder(tmp_path, "dmd2", config(tmp_path))
    write_config(tmp_path, "dmd2", config(Path(tmp_path)))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["out"] == str(tmp_path)


def test_folders_that_cannot_be_claimed_are_refused(tmp_path: Path):
    claimed(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(tmp_path / "run", "dmd2", config(tmp_path))
    with pytest.raises(UserError, match="holds no run"):
        check_folder(tmp_path / "new", "dmd2", config(tmp_path, resume=True))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        check_folder(tmp_path / "other", "dmd2", config(tmp_path))
    with pytest.raises(UserError, match="cannot be made"):
        check_folder(tmp_path / "other" / "thesis.tex", "dmd2", config(tmp_path))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "42"])
def test_settings_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path, content: str):
    out = claimed(tmp_path)
    (out / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        check_folder(out, "dmd2", config(out, resume=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(f.name for f in fields(RunConfig) if f.default is not MISSING))
def test_a_setting_that_was_not_there_yet_when_a_run_began_is_its_default(tmp_path: Path, name: str):
    """Each of them was new once; no run that an earlier version began could be resumed by the next one."""
    out = claimed(tmp_path)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({key: value for key, value in kept.items() if key != name}))
    assert not check_folder(out, "dmd2", config(out, resume=True))


def test_a_setting_that_was_not_there_yet_may_not_be_given_on_a_resume(tmp_path: Path):
    out = claimed(tmp_path)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept.pop("dynamic_shift") != "keep"
    (out / "config.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(UserError, match="--resume: dynamic_shift differ"):
        check_folder(out, "dmd2", config(out, resume=True, dynamic_shift="keep"))
