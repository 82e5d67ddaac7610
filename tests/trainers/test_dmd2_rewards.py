"""DMD2 with a reward (DMDR): where its gradient goes, when it is looked at, what it costs, and bad settings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mixture import MixtureTeacher
from torch import Tensor
from toys import Labels, TinyNetwork, labels, make_loop, role, unconditional

from fewstep.data.batch import Asked, Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers._rewards import _open, open_rewards
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.training.rewards import Rewards

GRID = (1.0, 0.5)


def config(out: Path, **settings) -> Dmd2Config:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "sample_steps": 0, "lr": 1e-3}
    return Dmd2Config(teacher="tiny", out=str(out), **{**defaults, **settings})


def first_entry(pictures: Tensor, asked) -> Tensor:
    return pictures.flatten(1)[:, 0]


def method(settings: Dmd2Config, rewarded: bool = True, beside=None) -> Dmd2:
    torch.manual_seed(0)
    teacher, roles, schedule = TinyNetwork(6), {}, FlowSchedule()
    for name in ("teacher", "student", "critic"):
        network = TinyNetwork(6)
        network.load_state_dict(teacher.state_dict())
        roles[name] = role(name, network, schedule, "flow", trainable=name != "teacher")
    rewards = None
    if rewarded:
        looks = settings.reward_look_steps
        rewards = Rewards(settings, {"first": first_entry}, beside, "x", lambda x0: 2 * x0, roles["teacher"], looks)
    sampler = Sampler(schedule, GRID, "fresh")
    return Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, rewards=rewards)


def batch(step: int, indices: range) -> Batch:
    return Batch(len(indices), (6,), labels([1.0] * len(indices)), Draws(0, step, indices), None, False)


def steps_that_end(last: int) -> list[int]:
    return [s for s in range(40) if Draws(0, s, [0]).shared_integer("student_step", 0, len(GRID)) == last]


def test_the_reward_of_the_last_steps_picture_is_one_more_piece_of_the_students_turn(tmp_path: Path):
    settings = config(tmp_path, reward="my.Reward", reward_weight=0.3, critic_updates=1, reward_look_steps=1000)
    one, without = method(settings), method(settings, rewarded=False)
    step = steps_that_end(1)[1]
    turn, plain = (next(m.turns(step, batch(step, range(4)))) for m in (one, without))
    assert len(turn.backward) == len(plain.backward) + 1 == 2
    assert torch.equal(turn.backward[0][1], plain.backward[0][1])
    (x0, _), (term, gradient) = turn.backward
    assert gradient is None
    # -w mean(2 x0[:, 0]): the decoder's factor is in it
    (at_x0,) = torch.autograd.grad(term, x0, retain_graph=True)
    expected = torch.zeros(4, 6)
    expected[:, 0] = -0.3 * 2 / 4
    torch.testing.assert_close(at_x0, expected)
    outside = [p.requires_grad_() for n in ("teacher", "critic") for p in one.roles[n].denoiser.network.parameters()]
    assert all(g is None for g in torch.autograd.grad(term, outside, allow_unused=True))
    assert turn.log.keys() - plain.log.keys() == {"student/reward_loss"}


def test_a_walk_that_ends_earlier_is_not_rewarded_nor_one_before_the_start(tmp_path: Path):
    settings = {"reward": "my.Reward", "critic_updates": 1, "reward_look_steps": 1000}
    early, last = steps_that_end(0)[1], steps_that_end(1)[1]
    one = method(config(tmp_path, **settings))
    assert len(next(one.turns(early, batch(early, range(4)))).backward) == 1
    late = method(config(tmp_path, **settings, reward_start_step=last + 1))
    assert len(next(late.turns(last, batch(last, range(4)))).backward) == 1


def test_at_weight_zero_a_run_is_that_without_a_reward_to_the_bit(tmp_path: Path):
    runs = []
    for name, rewarded in (("with", True), ("without", False)):
        given = {"reward": "my.Reward", "reward_weight": 0.0, "reward_look_steps": 1} if rewarded else {}
        one = method(config(tmp_path / name, max_steps=6, critic_updates=2, ema_decay=0.0, **given), rewarded)
        make_loop(one, one.config).run()
        runs.append([p for role in ("student", "critic") for p in one.roles[role].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_student_is_looked_at_every_so_many_steps_beside_a_metric_that_is_not_optimised(tmp_path: Path):
    settings = config(tmp_path, reward="my.Reward", max_steps=9, critic_updates=2, reward_look_steps=3)
    one = method(settings, beside=lambda pictures, asked: pictures.flatten(1)[:, 1])
    make_loop(one, settings).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = [row["step"] for row in rows if "student/reward" in row]
    assert seen == [1, 5, 9]  # steps 0, 4 and 8: every second student turn
    for row in rows:
        assert (row.keys() >= {"student/unrewarded_x", "student/pair_diversity"}) == ("student/reward" in row)
        assert row.get("student/pair_diversity", 1) > 0


def test_without_another_metric_it_is_the_teachers_fit(tmp_path: Path):
    settings = config(tmp_path, reward="my.Reward", critic_updates=1, reward_look_steps=1)
    one = method(settings)
    assert one.rewards is not None
    x0 = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    fit = one.rewards.fit(x0, one.sampler, batch(0, range(4)))
    noise = batch(0, range(4)).draws.normal("look_fit", (6,))
    with torch.no_grad():
        half = torch.full((4,), 0.5, dtype=torch.float64)
        said = one.roles["teacher"]((x0 + noise) / 2, half, labels([1.0] * 4))
    torch.testing.assert_close(fit, -(x0 - said).abs().mean() / x0.abs().mean())


def test_several_rewards_are_logged_each_and_summed_by_their_shares(tmp_path: Path):
    settings = config(tmp_path, reward="my.A,my.B", reward_shares=[1.0, 3.0])
    pairs = {"A": first_entry, "B": lambda pictures, asked: torch.full((len(pictures),), 2.0)}
    one = method(settings)
    rewards = Rewards(settings, pairs, None, "teacher", lambda x0: x0, one.roles["teacher"], 1)
    x0 = torch.arange(24.0).view(4, 6)
    torch.testing.assert_close(rewards.scores(x0, None), x0[:, 0] + 6)
    log = rewards.look(one.student, one.sampler, batch(0, range(4)))
    torch.testing.assert_close(log["student/reward"], log["student/reward_A"] + 3 * log["student/reward_B"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "beauty"}, "--reward takes aesthetic, clip, hps, pick"),
        ({"reward": "clip,clip"}, "names one twice"),
        ({"reward": "clip", "reward_beside": "clip"}, "is what the student is rewarded by"),
        ({"reward": "clip", "reward_beside": "fit"}, "--reward_beside takes"),
        ({"reward": "teacher"}, "--reward takes"),
        ({"reward": "clip", "reward_weight": -1.0}, "--reward_weight must not be negative"),
        ({"reward": "clip", "reward_look_steps": 0}, "--reward_look_steps must be at least 1"),
        ({"reward": "clip,pick", "reward_shares": [1.0]}, "--reward_shares has 1 for 2"),
        ({"reward": "clip,pick,hps", "reward_margin": [1.0, 2.0]}, "--reward_margin has 2 for 3"),
        ({"reward_margin": [1.0]}, "leave out --reward_margin"),
        ({"reward_files": "x"}, "leave out --reward_files"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_a_mixtures_student_goes_where_the_reward_leads_and_stays_near_its_teacher(tmp_path: Path):
    """The teacher's three modes have a third each; the reward of the right one comes to have most of the samples.

    Beside it the control: the same run at weight 0, whose samples stay spread over all three.
    """
    share, near = mixture_run(tmp_path / "rewarded", 1.5)
    assert share > 0.7  # 0.88 here
    assert near < 1.0  # 0.81 here; the modes are 3.4 apart
    control, _ = mixture_run(tmp_path / "control", 0.0)
    assert 0.2 < control < 0.5  # 0.36 here, a third of the mixture


def mixture_run(out: Path, weight: float) -> tuple[float, float]:
    """The share of a student's samples that is nearest to the rewarded mode, and the median distance to a mode."""
    torch.manual_seed(0)
    schedule, roles = FlowSchedule(), {}
    for name in ("teacher", "student", "critic"):
        roles[name] = role(name, MixtureTeacher(), schedule, "sample", trainable=name != "teacher")
    sampler = Sampler(schedule, (1.0, 0.75), "fresh")
    settings = config(
        out,
        max_steps=300,
        batch_size=64,
        lr=2e-3,
        critic_lr=5e-3,
        critic_updates=2,
        log_steps=300,
        checkpointing_steps=300,
        reward="my.Reward",
        reward_weight=weight,
        reward_look_steps=300,
    )

    def right(x0: Tensor, asked: Asked) -> Tensor:
        """How much nearer a sample is to the first mode than to the others, in [0, 1]."""
        return torch.softmax(-torch.cdist(x0, torch.tensor(MixtureTeacher.MEANS)).square() / 4, 1)[:, 0]

    rewards = Rewards(settings, {"right": right}, None, "teacher", lambda x0: x0, roles["teacher"], 300)
    one = Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, rewards=rewards)
    make_loop(one, settings, (2,), conditions=Labels(None)).run()
    generator = torch.Generator().manual_seed(2)

    def fresh(_step: int) -> Tensor:
        return torch.randn(2000, 2, generator=generator)

    with torch.no_grad():
        x0 = rollout(one.student, sampler, fresh(0), unconditional(2000), fresh)
    nearest = torch.cdist(x0, torch.tensor(MixtureTeacher.MEANS)).min(1)
    return (nearest.indices == 0).float().mean().item(), nearest.values.median().item()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda pictures, _: pictures.mean(), r"numbers of shape \(\); it must be one number for each"),
        (lambda pictures, _: pictures, r"the reward own of 4 pictures is numbers of shape \(4, 6\)"),
        (lambda *_: "nice", "is a str"),
        (lambda pictures, _: pictures.detach()[:, 0], "--reward my.Own has no gradient to the pictures"),
    ],
)
def test_what_is_no_reward_is_refused_when_it_is_asked(tmp_path: Path, reward, message: str):
    settings = config(tmp_path, reward="my.Own")
    rewards = Rewards(settings, {"own": reward}, None, "teacher", lambda x0: x0, lambda *_: None, 1)
    with pytest.raises(UserError, match=message):
        rewards.term(torch.ones(4, 6, requires_grad=True), batch(0, range(4)))


class Weak:
    """A reward that cannot bear a picture."""

    def __call__(self, pictures: Tensor, asked: Asked) -> Tensor:
        raise RuntimeError("expected 3 channels,\n  got 6")


def test_a_reward_that_fails_is_named_with_its_own_words(tmp_path: Path):
    rewards = Rewards(config(tmp_path, reward="my.Own"), {"own": Weak()}, None, "teacher", lambda x0: x0, None, 1)
    words = r"^the reward own \(Weak\) failed on 4 pictures: expected 3 channels, got 6$"
    with pytest.raises(UserError, match=words) as refused:
        rewards.term(torch.ones(4, 6, requires_grad=True), batch(0, range(4)))
    assert isinstance(refused.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "name", ["json.JSONDecoder", "math.pi", "no_module.Reward", "json.nothing", "pathlib.PosixPath"]
)
def test_a_class_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=rf"--reward {name} (cannot be made|makes nothing)") as caught:
        _open(name, config(tmp_path, reward=name), torch.device("cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"reward": "clip"}, {"reward": "my.Own", "reward_beside": "pick"}])
def test_what_reads_prompts_is_refused_of_a_teacher_of_labels_before_its_files_are_missed(
    tmp_path: Path, settings: dict
):
    bench = SimpleNamespace(recording=SimpleNamespace(conditional="label"))
    with pytest.raises(UserError, match=r"the reward (clip|pick) reads prompts, and this teacher takes none"):
        open_rewards(config(tmp_path, **settings), bench, lambda *_: None)
