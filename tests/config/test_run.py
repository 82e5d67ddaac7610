"""Settings that cannot work are refused in one line."""

import pytest

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
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
