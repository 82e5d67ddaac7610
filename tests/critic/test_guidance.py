"""Guidance of the critic: the scales that a run means, and prompts replaced by the negative."""

import pytest
import torch

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import RaggedConditioning, in_groups, join, with_others
from fewstep.config.critic import CriticGuidanceConfig, Kappas
from fewstep.critic.guidance import with_dropout
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.intervals import TimedScale, TimeIntervals
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError


def texts(batch: int, length: int, value: float) -> Conditioning:
    return Conditioning({"text": Leaf(torch.full((batch, length), value), rows=1)}, batch)


def said(conditioning) -> list[float]:
    """The first number that each of 8 samples is told."""
    x, t = torch.zeros(8, 1), torch.zeros(8)
    return in_groups(lambda _x, _t, c, _end: c.arguments()["text"][:, :1], x, t, conditioning).flatten().tolist()


@pytest.mark.parametrize("length", [4, 2], ids=["of one length", "of two lengths"])
def test_a_dropped_prompt_becomes_the_negative_whatever_its_length(length: int):
    told = with_others(texts(8, 4, 1.0), [texts(8, length, -1.0)])
    mixed = with_dropout(told, Draws(0, 0, range(8)), 0.5)
    assert isinstance(mixed, RaggedConditioning) == (length != 4)
    coins = Draws(0, 0, range(8)).coins("critic_dropout", 0.5)
    assert said(mixed) == [-1.0 if dropped else 1.0 for dropped in coins]
    assert set(said(mixed)) == {-1.0, 1.0}
    assert said(mixed.others[0]) == [-1.0] * 8  # who lost its prompt is still led away from the same


def test_each_sample_loses_its_condition_to_its_own_last_further_answer():
    own = [join([texts(1, 2, kind + row) for row in range(8)]) for kind in (0, 100, 200)]
    told, coins = with_others(own[0], own[1:]), Draws(0, 0, range(8)).coins("critic_dropout", 0.5)
    assert said(with_dropout(told, Draws(0, 0, range(8)), 0.5)) == [200.0 * coin + k for k, coin in enumerate(coins)]
    assert with_dropout(told, Draws(0, 0, range(8)), 0.0) is told
    with pytest.raises(ValueError, match="cannot lose their condition"):
        with_dropout(own[0], Draws(0, 0, range(8)), 1.0)


def test_scales_that_change_with_the_time_are_the_critics_too():
    scale = TimedScale(TimeIntervals(FlowSchedule(), (0.9, 0.0)), (3.0, 4.0))
    config = CriticGuidanceConfig(teacher="t", out="o", critic_training_guidance=1.0)
    assert config.kappas(scale) == Kappas(1.0, scale, scale)


def test_a_strategy_fixes_every_scale():
    with pytest.raises(UserError, match="leave out --critic_training_guidance: it is fixed by --guidance zero"):
        CriticGuidanceConfig(teacher="t", out="o", guidance="zero", critic_training_guidance=1.0)
