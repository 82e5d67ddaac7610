"""Flash-DMD's preferences: the pairwise loss, its closed forms, who is updated when, and that the reward rises."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import make_loop

from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.losses.preference import log_likelihood_ratio, preference_loss
from fewstep.programs.planning.call_counts import CallCounter
from fewstep.trainers.flash_dmd import FlashDmd
from fewstep.training.method import Pull, Turn
from tests.trainers.test_flash_dmd import batch
from tests.trainers.toy_flash_dmd import config, method

DIRECTION = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])


def reward(pictures: Tensor, _asked: object) -> Tensor:
    return pictures @ DIRECTION


def preferring(out: Path, schedule: NoiseSchedule | None = None, kind: str = "flow", **settings) -> FlashDmd:
    given = {"gan_weight": 0.0, "reward": "toys.reward", "matched_steps": 2, "renoise": "fresh", **settings}
    return method(config(out, **given), schedule, kind, reward=reward)


def test_the_ratio_is_that_of_two_normal_densities():
    torch.manual_seed(0)
    z, mean, reference = torch.randn(3, 4, 5, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.7, 1.0, 2.0], dtype=torch.float64)
    first, second = (torch.distributions.Normal(m, sigma[:, None]).log_prob(z).mean(1) for m in (mean, reference))
    torch.testing.assert_close(log_likelihood_ratio(z, mean, reference, sigma), first - second)


def test_at_the_reference_a_pair_and_its_exchange_pull_at_nothing():
    torch.manual_seed(0)
    mean = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    pair, sigma = torch.randn(2, 4, 5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    a, b = (log_likelihood_ratio(z, mean, mean.detach(), sigma) for z in pair)
    one, both = preference_loss(a, b, 7.0), preference_loss(a, b, 7.0) + preference_loss(b, a, 7.0)
    assert one.item() == pytest.approx(torch.tensor(2.0).log().item())
    # -beta / 2 (z_w - z_l) / (sigma^2 n B): half of the pull is used where nothing leads yet.
    expected = -3.5 * (pair[0] - pair[1]) / (5 * 4)
    torch.testing.assert_close(torch.autograd.grad(one, mean, retain_graph=True)[0], expected)
    assert torch.autograd.grad(both, mean)[0].abs().max() < 1e-12


def test_five_updates_by_preferences_for_one_by_distillation(tmp_path: Path):
    one = preferring(tmp_path, reward_start_step=4)
    played = [[t.role for t in one.turns(step, batch(step)) if isinstance(t, Turn)] for step in range(18)]
    both, critic, preference = ["student", "critic"], ["critic"], ["student"]
    assert played[:4] == [both, critic, both, critic]
    assert played[4:] == [*[preference] * 5, both, critic] * 2
    assert [one.target_decay(step) for step in (0, 3, 4, 17)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_where_the_student_is_the_reference_the_loss_is_a_coins_times_its_weight(tmp_path: Path, weight: float):
    one = preferring(tmp_path, reward_weight=weight)
    turn = next(one.turns(0, batch(0)))
    assert isinstance(turn, Turn)
    ((loss, gradient),) = turn.backward
    assert gradient is None and loss.item() == pytest.approx(weight * torch.tensor(2.0).log().item(), rel=1e-5)


def test_beside_the_reference_the_loss_falls_by_half_of_beta_times_the_lead(tmp_path: Path):
    losses = []
    for beta in (1e-3, 2e-3):
        one = preferring(tmp_path, preference_beta=beta)
        for parameter in one.roles["target"].weights.parameters():
            parameter.data.mul_(0.5)
        turn = next(one.turns(0, batch(0)))
        assert isinstance(turn, Turn)
        losses.append(turn.backward[0][0].item() - torch.tensor(2.0).log().item())
    assert losses[0] != 0 and losses[1] / losses[0] == pytest.approx(2, rel=0.02)


def test_successors_are_judged_by_what_the_student_sees_in_them_at_their_own_step(tmp_path: Path):
    one, asked = preferring(tmp_path, preference_candidates=3), []
    one.student.denoiser.on_call = lambda _x, t, _early: asked.append(t[0].item()) or (lambda _answer: None)
    for step in range(4):
        asked.clear()
        next(one.turns(step, batch(step)))
        place = batch(step).draws.shared_integer("student_step", 0, 2)
        assert asked == [*one.sampler.grid[: place + 1], *[one.sampler.grid[place + 1]] * 3]


def test_the_critic_follows_the_student_in_updates_by_preferences_too(tmp_path: Path):
    (_, pull) = preferring(tmp_path, critic_follows_student=0.9).turns(0, batch(0))
    assert pull == Pull("critic", "student", 0.9)


def test_a_step_of_preferences_costs_what_is_declared(tmp_path: Path):
    one = preferring(tmp_path, max_steps=4, log_steps=100, preference_candidates=3)
    with CallCounter(one) as counter:
        make_loop(one, one.config).run()
    for step in (1, 2):  # the first and the last are logged
        assert counter.calls(step) == declared(one, step, batch(step))


def test_the_reference_is_the_student_of_when_preferences_began(tmp_path: Path):
    one = preferring(tmp_path, reward_start_step=3, max_steps=6, lr=1e-2)
    loop, kept = make_loop(one, one.config), []
    advance = loop.monitor.advance
    loop.monitor.advance = lambda step: (
        kept.append([{k: v.clone() for k, v in one.roles[n].state_dict().items()} for n in ("student", "target")]),
        advance(step),
    )
    loop.run()
    for _, target in kept[2:]:
        torch.testing.assert_close(target, kept[2][0], rtol=0, atol=0)
    assert any(not torch.equal(value, kept[2][0][name]) for name, value in kept[5][0].items())


def test_preferences_raise_the_reward_and_keep_what_it_does_not_see(tmp_path: Path):
    one = preferring(tmp_path, max_steps=40, preference_updates=40, preference_beta=20.0, lr=3e-3)

    def means() -> Tensor:
        with torch.no_grad():
            return torch.stack([one.called(batch(step, 64)).x0.mean(0) for step in range(8)]).mean(0)

    before = means()
    make_loop(one, one.config).run()
    moved = means() - before
    assert moved[0] > 0.05
    assert moved[1:].abs().max() < 0.6 * moved[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renoise": "ode"}, "of which --renoise ode has one"),
        ({"preference_candidates": 1}, "at least 2"),
        ({"preference_updates": 0}, "at least 1"),
        ({"steps": 1, "matched_steps": 1}, "a single step has none"),
        ({"reward_margin": [1.0]}, "leave out --reward_margin"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **{"gan_weight": 0.0, "reward": "toys.reward", **settings})
