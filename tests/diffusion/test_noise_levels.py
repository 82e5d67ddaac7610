"""Noise levels: what each distribution is, what a teacher's family makes of the settings, and what is refused."""

import math

import pytest
import torch

from fewstep.config.times import NoiseLevelConfig
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.noise_levels import NoiseLevels
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.trainers.dmd2 import Dmd2Config

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
UNIFORM = torch.linspace(0, 1, 5, dtype=torch.float64)
NORMAL = torch.tensor([-1.0, 0.0, 2.0])


def config(**settings) -> NoiseLevelConfig:
    return NoiseLevelConfig(teacher="t", out="o", **settings)


def test_a_uniform_lies_between_its_bounds_and_on_the_table():
    levels = NoiseLevels("uniform", 0.02, 0.98)
    torch.testing.assert_close(levels.times(UNIFORM, FlowSchedule()), 0.02 + 0.96 * UNIFORM)
    assert (levels.times(UNIFORM, TABLE) * 1000 - torch.tensor([20, 260, 500, 740, 980])).abs().max() < 1e-9


def test_a_shifted_uniform_is_clamped_after_the_shift():
    times = NoiseLevels("uniform", 0.02, 0.98, shift=5.0).times(UNIFORM, FlowSchedule())
    assert times.tolist() == pytest.approx([0.02, 0.625, 5 / 6, 0.9375, 0.98])


def test_a_logit_normal_is_the_sigmoid_of_a_normal():
    times = NoiseLevels("logit_normal", mean=0.7, std=1.6).times(NORMAL, FlowSchedule())
    torch.testing.assert_close(times, torch.sigmoid(0.7 + 1.6 * NORMAL.double()))


def test_a_log_normal_is_one_of_the_noise_level():
    for schedule in (EDMSchedule(), FlowSchedule()):
        alpha, sigma = schedule.coefficients(NoiseLevels("log_normal", mean=-1.2, std=1.2).times(NORMAL, schedule))
        torch.testing.assert_close(sigma / alpha, torch.exp(-1.2 + 1.2 * NORMAL.double()))


def test_times_are_draws_of_their_samples():
    for kind in ("uniform", "logit_normal", "log_normal"):
        levels = NoiseLevels(kind)
        both = levels.draw(Draws(0, 3, range(4)), "time", FlowSchedule())
        parts = [levels.draw(Draws(0, 3, part), "time", FlowSchedule()) for part in (range(2), range(2, 4))]
        assert torch.equal(both, torch.cat(parts))
        assert both.dtype == torch.float64


def test_the_defaults_are_the_familys():
    assert config().levels(TABLE) == NoiseLevels("uniform", 0.02, 0.98)
    assert config().levels(EDMSchedule()) == NoiseLevels("uniform", 0.0, 0.8)
    assert config().levels(FlowSchedule()) == NoiseLevels("logit_normal", mean=math.log(2), std=1.6)
    assert config(times="uniform", time_shift=5.0).levels(FlowSchedule()) == NoiseLevels("uniform", 0.02, 0.98, 5.0)
    assert config(time_mean=0.0, time_std=1.0).levels(FlowSchedule()) == NoiseLevels("logit_normal")


def test_score_methods_shift_the_times_of_flow_teachers_only() -> None:
    compared = Dmd2Config(teacher="t", out="o", time_shift=5.0)
    assert compared.shift_of_times(FlowSchedule(), 3.0) == 5.0
    assert Dmd2Config(teacher="t", out="o").shift_of_times(TABLE, 1.0) == 1.0
    with pytest.raises(UserError, match="leave out --time_shift: it belongs to flow-matching teachers"):
        compared.shift_of_times(TABLE, 1.0)


@pytest.mark.parametrize(
    ("settings", "schedule", "message"),
    [
        ({"time_min": 0.1}, FlowSchedule(), "leave out --time_min: it belongs to uniform times"),
        ({"time_std": 1.0}, TABLE, "leave out --time_std: it belongs to logit-normal times"),
        ({"time_shift": 3.0}, TABLE, "leave out --time_shift: it belongs to flow-matching teachers"),
        ({"time_min": 0.5, "time_max": 0.4}, TABLE, "min < max <= 1"),
        ({"time_max": 1.5}, TABLE, "min < max <= 1"),
        ({"times": "normal"}, TABLE, "--times must be one of auto, uniform, logit_normal"),
        ({"time_shift": 0.0}, FlowSchedule(), "time_shift must be positive"),
        ({"time_min": -0.1}, TABLE, "time_min must not be negative"),
    ],
)
def test_settings_of_another_distribution_or_family_are_refused(settings: dict, schedule, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings).levels(schedule)
