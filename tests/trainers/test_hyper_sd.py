"""Hyper-SD: which stage updates whom by what, its closed forms, the order of its turns, and bad settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TABLE, Labels, every_kind_of_teacher, labels, make_loop

from fewstep.data.batch import Batch, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import rollout
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.trainers.hyper_sd import HyperSd
from fewstep.training.method import Turn
from tests.trainers.toy_hyper_sd import STAGES, config, toy_method


class Numbers:
    """Real samples with labels."""

    def batch(self, seed: int, positions: list[int]) -> Real:
        x0 = torch.stack([torch.full((6,), float(position % 5) / 2) for position in positions])
        return Real(x0, Labels().batch(seed, positions))


def batch(step: int, size: int = 4) -> Batch:
    given = Batch(size, (6,), labels([1.0] * size), Draws(0, step, range(size)), None, False)
    return replace(given, given_real=Numbers().batch(0, list(range(size))))


def turns(method: HyperSd, step: int) -> list[tuple[str, int]]:
    """Who is updated in a step, and by how many pieces."""
    return [(turn.role, len(turn.backward)) for turn in method.turns(step, batch(step))]


def test_each_stage_adds_its_own_to_the_trajectories_loss(tmp_path: Path):
    method = toy_method(config(tmp_path))
    assert [turns(method, step) for step in range(8)] == [
        [("student", 1)],
        [("student", 1)],
        [("student", 2)],  # the reward
        [("student", 2)],
        [("student", 3), ("critic", 1)],  # the match, and the reward
        [("critic", 1)],
        [("student", 3), ("critic", 1)],
        [("critic", 1)],
    ]


def test_the_students_turns_are_counted_from_the_beginning_of_its_last_stage(tmp_path: Path):
    method = toy_method(config(tmp_path, reward=None, stages="tscd:3,score"))
    both = [("student", 2), ("critic", 1)]
    assert [turns(method, step) for step in range(2, 7)] == [[("student", 1)], both, both[1:], both, both[1:]]


def test_the_trajectories_are_weighed_in_later_stages_alone(tmp_path: Path):
    plain, weighed = (toy_method(config(tmp_path, trajectory_weight=weight)) for weight in (1.0, 0.3))
    for step, ratio in ((0, 1.0), (2, 0.3), (4, 0.3)):
        whole, part = (next(method.turns(step, batch(step))).backward[0][0].item() for method in (plain, weighed))
        assert whole > 0 and part == pytest.approx(ratio * whole, rel=1e-6)


def test_without_their_weight_the_trajectories_are_not_asked_in_later_stages(tmp_path: Path):
    method = toy_method(config(tmp_path, trajectory_weight=0.0))
    asked: list[str] = []
    for name, one in method.roles.items():
        one.denoiser.network.register_forward_hook(lambda *_, name=name: asked.append(name))
    assert turns(method, 2) == [("student", 1)]
    assert asked == ["student"]
    asked.clear()
    assert turns(method, 4) == [("student", 2), ("critic", 1)]
    assert sorted(asked) == ["critic", "critic", "student", "teacher"]


def test_the_first_stage_is_segmented_consistency_to_the_bit(tmp_path: Path):
    method = toy_method(config(tmp_path))
    for step in range(2):
        found = []
        for one in (method, method.trajectories):
            turn = next(one.turns(step, batch(step)))
            assert isinstance(turn, Turn)
            ((loss, gradient),) = turn.backward
            found.append(torch.autograd.grad(loss, method.roles["student"].parameters(), gradient))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("step", [2, 4])
def test_every_piece_reaches_the_student_alone(tmp_path: Path, step: int):
    method = toy_method(config(tmp_path))
    turn = next(method.turns(step, batch(step)))
    for role in method.roles.values():
        role.denoiser.network.requires_grad_()
    parameters = {name: list(role.denoiser.network.parameters()) for name, role in method.roles.items()}
    for tensor, gradient in turn.backward:
        for name, own in parameters.items():
            found = torch.autograd.grad(tensor, own, gradient, allow_unused=True, retain_graph=True)
            assert any(g is not None for g in found) == (name == "student")


def test_the_feedback_is_the_hinge_of_the_one_step_prediction_from_noise(tmp_path: Path):
    settings = config(tmp_path, reward_margin=[0.2], reward_weight=0.7, trajectory_weight=0.0)
    method = toy_method(settings)
    ((loss, _),) = next(method.turns(2, batch(2))).backward
    noise = batch(2).draws.normal("one_step_noise", (6,))
    with torch.no_grad():
        x0 = method.student(noise, torch.ones(4, dtype=torch.float64), labels([1.0] * 4))
    assert loss.item() == pytest.approx(0.7 * (0.2 - x0[:, 0]).relu().mean().item(), rel=1e-5)


def test_the_match_is_of_the_one_step_sample_and_vanishes_while_the_critic_is_the_teacher(tmp_path: Path):
    method = toy_method(config(tmp_path, reward=None, stages="tscd:2,score", score_weight=3.0))
    x0 = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    gradient, _ = method.matching(x0, batch(2))
    assert gradient.abs().max() == 0
    with torch.no_grad():
        for parameter in method.roles["critic"].parameters():
            parameter.mul_(1.5)
    gradient, _ = method.matching(x0, batch(2))
    here = method.compared(x0, batch(2).draws, "matching")
    with torch.no_grad():
        critic, teacher = (method.roles[n](here.x_t, here.t, labels([1.0] * 4)) for n in ("critic", "teacher"))
    scale = (x0 - teacher).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradient, 3 * (critic - teacher) / scale / x0.numel())


def test_the_match_is_divided_by_no_less_than_the_least_normalizer(tmp_path: Path):
    method = toy_method(config(tmp_path, reward=None, stages="tscd:2,score", score_weight=1.0, normalizer_min=50.0))
    with torch.no_grad():
        for parameter in method.roles["critic"].parameters():
            parameter.mul_(1.5)
    x0 = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    gradient, _ = method.matching(x0, batch(2))
    here = method.compared(x0, batch(2).draws, "matching")
    with torch.no_grad():
        critic, teacher = (method.roles[n](here.x_t, here.t, labels([1.0] * 4)) for n in ("critic", "teacher"))
    torch.testing.assert_close(gradient, (critic - teacher) / 50 / x0.numel())


def test_a_sample_of_one_step_is_what_the_student_says_of_the_noise_however_its_walks_go(tmp_path: Path):
    """TCD's walks of a table end at its first entry, and not at the clean sample."""
    method = toy_method(config(tmp_path, renoise="tcd"), TABLE, "epsilon")
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = rollout(method.student, method.one_step, noise, labels([1.0] * 4))
        said = method.student(noise, torch.ones(4, dtype=torch.float64), labels([1.0] * 4))
    assert torch.equal(found, said)


@every_kind_of_teacher
def test_every_kind_of_teacher_trains_student_and_critic(tmp_path: Path, schedule: NoiseSchedule, kind: str):
    method = toy_method(config(tmp_path, max_steps=6), schedule, kind)
    before = {n: [p.clone() for p in method.roles[n].parameters()] for n in ("student", "critic")}
    make_loop(method, method.config, real=Numbers()).run()
    for name, values in before.items():
        assert any(not torch.equal(a, b) for a, b in zip(values, method.roles[name].parameters(), strict=True))


def test_a_run_resumed_in_its_last_stage_is_the_undisturbed_one(tmp_path: Path):
    def weights(method: HyperSd) -> list[Tensor]:
        return [p.detach().clone() for name in ("student", "critic") for p in method.roles[name].parameters()]

    whole = toy_method(config(tmp_path / "whole"))
    make_loop(whole, whole.config, real=Numbers()).run()
    first = toy_method(config(tmp_path / "cut", checkpointing_steps=5))
    loop = make_loop(first, first.config, real=Numbers())
    loop.config.max_steps = 5
    loop.run()
    then = toy_method(config(tmp_path / "cut", checkpointing_steps=5))
    loop = make_loop(then, then.config, real=Numbers())
    loop.resume()
    loop.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(then), strict=True))


def test_rates_and_stages_follow_from_the_settings(tmp_path: Path):
    one = config(tmp_path, lr=1e-3, feedback_lr=1e-4, critic_lr=5e-3)
    rates = [one.rate("student", step) for step in (0, 2, 4)]
    assert rates == [1e-3, 1e-4, 1e-3]
    assert one.rate("critic", 4) == 5e-3
    assert one.resolved().stage_steps == [1]  # two segments' stages in the two steps of tscd
    default = config(tmp_path, stages=None, max_steps=100)
    assert default.starts() == {"tscd": 0, "feedback": 60, "score": 80}
    assert config(tmp_path, stages=None, reward=None, max_steps=100).starts() == {"tscd": 0, "score": 60}
    later = config(tmp_path, stages="feedback:2,score", segments=None, intervals=[8]).resolved()
    assert (later.segments, later.stage_steps) == ([1], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "score:2,feedback"}, "feedback comes before score"),
        ({"stages": "tscd:2,cmt"}, "--stages takes such as tscd:4000"),
        ({"stages": "tscd,score"}, "tscd needs its number of steps"),
        ({"stages": "tscd:8,score"}, "score begins at step 8"),
        ({"stages": STAGES, "reward": None}, "stage feedback learns from a reward"),
        ({"stages": "tscd"}, "--reward is that of the stages feedback and score"),
        ({"variant": "pcm", "segments": [4]}, "--variant must be one of tscd, tcd"),
        ({"stage_steps": [2]}, "which ends after 2 steps"),
        ({"trajectory_weight": -1.0}, "--trajectory_weight must not be negative"),
        ({"reward_margin": [1.0, 2.0]}, "--reward_margin has 2 for 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)
