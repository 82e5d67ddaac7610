"""Settings that cannot work are refused in one line; what follows from the others is said beside what was given."""

from dataclasses import replace
from typing import Any

import pytest

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.export.precision import EXPORT_DTYPES
from fewstep.programs.methods import method_class, methods
from fewstep.trainers.dmd2 import Dmd2Config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -1),
        ("max_steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("log_steps", 0),
        ("lr", -1e-5),
        ("max_grad_norm", -1.0),
        ("lr_warmup_steps", -1),
        ("sample_steps", -1),
        ("eval_steps", -1),
        ("eval_patience", -1),
        ("eval_samples", 1),
        ("seed", -1),
        ("ema_decay", 1.0),
        ("ema_decay", -0.1),
        ("adam_beta1", 1.0),
        ("renoise", "sde"),
        ("mixed_precision", "fp16"),
        ("shift", 0.0),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: object):
    with pytest.raises(UserError, match=f"--{name}") as caught:
        RunConfig(teacher="t", out="o", **{name: value})
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_numbers_are_refused():
    for name in ("lr", "max_grad_norm", "ema_decay", "shift"):
        with pytest.raises(UserError, match=f"--{name}"):
            RunConfig(teacher="t", out="o", **{name: float("nan")})


def test_a_setting_that_is_null_is_refused_by_name():
    with pytest.raises(UserError, match="--steps must have a value"):
        RunConfig(teacher="t", out="o", steps=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("critic_lr", -1.0),
        ("critic_lr", float("nan")),
        ("normalizer_min", -1.0),
        ("gan_weight", -1.0),
        ("gan_critic_weight", -1.0),
        ("time_shift", 0.0),
        ("time_shift", -3.0),
    ],
)
def test_settings_of_dmd2_that_cannot_work_are_refused_by_name(name: str, value: float):
    with pytest.raises(UserError, match=f"--{name}"):
        Dmd2Config(teacher="t", out="o", **{name: value})


def test_prompts_and_classes_exclude_each_other():
    with pytest.raises(UserError, match="not both"):
        RunConfig(teacher="t", out="o", prompts="p.txt", classes="0-9")


@pytest.mark.parametrize(
    ("name", "value"),
    [("eval_metric", "fd_test"), ("eval_patience", 3), ("eval_weights", "w"), ("export_best", True)],
)
def test_what_is_about_evaluations_is_refused_in_a_run_without(name: str, value: object):
    with pytest.raises(UserError, match=f"--{name} belongs to evaluations: give --eval_steps, or leave it out"):
        RunConfig(teacher="t", out="o", **{name: value})
    assert getattr(RunConfig(teacher="t", out="o", eval_steps=10, **{name: value}), name) == value


# --- what follows -----------------------------------------------------------------------------------------------------

LCM = {"solver": "euler", "distance": "pseudo_huber_elementwise", "huber_c": 1e-3, "weighting": "uniform"}
LCM |= {"target_decay": 0.95, "intervals": 50, "renoise": "fresh"}
ICT = {"solver": "none", "distance": "pseudo_huber_norm", "weighting": "1/(t-r)", "target_decay": 0.0}
ICT |= {"first_levels": 10, "last_levels": 1280}


@pytest.mark.parametrize(
    ("method", "given", "follows"),
    [
        ("dmd2", {}, {}),
        ("disback", {"max_steps": 440, "degradation_steps": 40, "record_steps": [20, 40]}, {"node_steps": 200}),
        ("rectified_flow", {}, {}),
        ("consistency", {}, LCM),
        ("consistency", {"lora_rank": 4, "steps": 1}, {**LCM, "target_decay": 0.0, "renoise": "auto"}),
        ("consistency", {"variant": "ict", "data": "d"}, {**ICT, "renoise": "fresh"}),
        ("consistency", {"variant": "ict", "data": "d", "steps": 1}, ICT),
        ("mean_flow", {}, {"velocity": "teacher"}),
        ("mean_flow", {"data": "d"}, {"velocity": "data"}),
        ("multi_student", {}, {"students": 4}),
        ("multi_student", {"partition": "lists", "lists": ["0", "1"]}, {"students": 2}),
        (
            "multi_student",
            {"student_network": {"num_layers": 1}, "data": "d"},
            {"students": 4, "pretraining_steps": 333},
        ),
        ("perflow", {"steps": 2}, {"windows": 2}),
        ("phased_dmd", {"steps": 3}, {"phases": [2, 1], "phase_steps": 500}),
        ("phased_dmd", {"order": "alternating"}, {"phases": [2, 2]}),
        ("sid", {}, {"start": "noise"}),
        ("sid", {"steps": 1, "first_timestep": 625}, {"start": "marginal"}),
    ],
)
def test_what_follows_is_said_beside_what_was_given(method: str, given: dict, follows: dict[str, Any]):
    config = method_class(method).Config(teacher="t", out="o", **given)
    before = config.as_dict()
    assert all(before[name] in (None, "auto") for name in follows)
    assert config.resolved().as_dict() == {**before, **follows}
    assert config.as_dict() == before
    assert list(config.resolved().as_dict()) == list(before)


@pytest.mark.parametrize("method", methods())
def test_resolving_twice_and_what_was_written_down_change_nothing(method: str):
    needed = {"data": "images"} if method == "flash_dmd" else {}
    config = method_class(method).Config(teacher="t", out="o", **needed)
    resolved = config.resolved()
    assert type(resolved) is type(config)
    assert resolved.resolved() == resolved
    assert type(config)(**resolved.as_dict()).resolved() == resolved


def test_a_change_of_one_setting_changes_what_follows():
    config = method_class("phased_dmd").Config(teacher="t", out="o", max_steps=100)
    later = replace(config, steps=2, max_steps=300).resolved()
    assert (later.phases, later.phase_steps) == ([1, 1], 150)


def test_the_precision_of_an_export_is_a_known_one_of_a_whole_pipeline():
    given = {"teacher": "t", "out": "o"}
    for name in EXPORT_DTYPES:
        assert RunConfig(**given, export_dtype=name).export_dtype == name
        assert RunConfig(**given, export_dtype=name, lora_rank=4, merge=True).merge
    with pytest.raises(UserError, match="--export_dtype must be one of float32, bfloat16, float16, not 'fp16'"):
        RunConfig(**given, export_dtype="fp16")
    with pytest.raises(UserError, match="--export_dtype is of a whole pipeline's network: give --merge"):
        RunConfig(**given, export_dtype="float16", lora_rank=4)
