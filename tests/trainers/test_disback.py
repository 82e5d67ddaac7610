"""DisBack: the path that is recorded, the way back over it, what it shares with DMD2, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mixture import MixtureTeacher, distance_of_walk
from torch import Tensor, nn
from toys import Labels, TinyNetwork, every_kind_of_teacher, make_loop, role

from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NODE, Role
from fewstep.trainers.disback import Disback, DisbackConfig, node_names
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.training.finite import find_in_step
from fewstep.training.initialization import initialize
from fewstep.training.method import Renew
from tests.trainers.test_dmd2 import batch

COMMON = {"batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-2, "sample_steps": 0}


def config(out: Path, **settings) -> DisbackConfig:
    defaults = {"max_steps": 14, "degradation_steps": 6, "record_steps": [2, 4, 6], "node_steps": 2}
    return DisbackConfig(teacher="tiny", out=str(out), **{**COMMON, "critic_updates": 2, **defaults, **settings})


def method(
    settings: DisbackConfig, schedule: NoiseSchedule | None = None, kind: str = "flow", network=lambda: TinyNetwork(6)
) -> Disback:
    """DisBack over vectors; all roles start as the teacher."""
    schedule, settings = schedule or FlowSchedule(), settings.resolved()
    torch.manual_seed(0)
    weights, roles = network().state_dict(), {}
    for name in ("teacher", "student", "critic", *node_names(settings)):
        one = network()
        one.load_state_dict(weights)
        roles[name] = role(name, one, schedule, kind, trainable=name in ("student", "critic"))
    targets = [*(roles[name] for name in reversed(node_names(settings)[:-1])), roles["teacher"]]
    guided = [GuidedDenoiser(target, 1.0, further=0) for target in targets]
    grid = (1.0, 0.75)[: settings.steps]
    return Disback(settings, roles, guided, Sampler(schedule, grid, "fresh", schedule.initial_scale()))


def weights_of(one: Disback, name: str) -> Tensor:
    return nn.utils.parameters_to_vector(one.roles[name].denoiser.network.parameters()).detach().clone()


class Watched(Disback):
    """DisBack, noting before every update whose turn it is, the critic and the student."""

    def turns(self, step, batch):
        for turn in super().turns(step, batch):
            what = f"renew {turn.role} like {turn.like}" if isinstance(turn, Renew) else turn.role
            self.noted.append((step, what, weights_of(self, "critic"), weights_of(self, "student")))
            yield turn


def run(one: Disback) -> list[tuple[int, str, Tensor, Tensor]]:
    one.__class__, one.noted = Watched, []
    make_loop(one, one.config).run()
    return one.noted


# --- the order of things ----------------------------------------------------------------------------------------------


def test_the_path_is_recorded_of_the_critic_while_the_student_stands_still(tmp_path: Path):
    one = method(config(tmp_path, max_steps=6))
    student = weights_of(one, "student")
    every = run(one)
    kept = [(step, what) for step, what, *_ in every if what.startswith("renew")]
    assert kept == [(2 * k - 1, f"renew {NODE}{k} like critic") for k in (1, 2, 3)]
    noted = [one for one in every if not one[1].startswith("renew")]
    assert [(step, what) for step, what, *_ in noted] == [(step, "critic") for step in range(6)]
    assert all(torch.equal(now, student) for *_, now in noted)
    # Before the updates of steps 2 and 4 the critic is what was kept after two and four; after the last it is node 3.
    assert torch.equal(weights_of(one, f"{NODE}1"), noted[2][2])
    assert torch.equal(weights_of(one, f"{NODE}2"), noted[4][2])
    assert torch.equal(weights_of(one, f"{NODE}3"), weights_of(one, "critic"))
    assert not torch.equal(noted[2][2], noted[4][2])


def test_a_step_that_is_played_again_leaves_the_path_as_it_was_recorded(tmp_path: Path):
    """As the search for a number that is not finite plays it, with the critic of a later step."""
    one = method(config(tmp_path, max_steps=6))
    run(one)
    before = weights_of(one, f"{NODE}1")
    found = find_in_step(one, 1, [batch(1, range(4))], {"critic": dict(one.roles["critic"].named_parameters())})
    assert found is None and torch.equal(weights_of(one, f"{NODE}1"), before)


def test_the_way_back_has_every_node_as_the_target_the_most_degraded_first_and_then_the_teacher(tmp_path: Path):
    one = method(config(tmp_path))
    asked: list[tuple[int, str]] = []
    step = -1
    for name in ("teacher", *node_names(one.config)):
        network = one.roles[name].denoiser.network
        network.register_forward_hook(lambda *_, name=name: asked.append((step, name)))
    for step in range(6, 14):
        list(one.turns(step, batch(step, range(4))))
    # Node 3 is where the critic starts; the student moves in every second step.
    assert asked == [(6, f"{NODE}2"), (8, f"{NODE}1"), (10, "teacher"), (12, "teacher")]


def test_a_node_is_the_target_for_as_many_steps_as_are_asked_and_the_students_turns_begin_with_the_way_back(
    tmp_path: Path,
):
    one = method(config(tmp_path, degradation_steps=5, record_steps=[1, 3, 5], node_steps=3, critic_updates=2))
    assert [one.place(step) for step in range(14)] == [-1] * 5 + [0] * 3 + [1] * 3 + [2] * 3
    played = [[turn.role for turn in one.turns(step, batch(step, range(4)))] for step in (5, 6, 7)]
    assert played == [["critic", "student", "critic"], ["critic"], ["student", "critic"]]  # at first the critic's start


def test_nodes_are_prepared_as_targets_under_a_guidance_of_their_own_the_most_degraded_first(tmp_path: Path):
    settings = config(tmp_path, node_guidance_scale=1.5)
    toy, asked = method(settings), []

    def guided(role: Role, scale: float | None = None) -> GuidedDenoiser:
        asked.append((role, scale))
        return GuidedDenoiser(role, 1.0, further=0)

    names = ("student", "critic", *node_names(settings))
    make = {names: lambda: toy.roles}
    bench = SimpleNamespace(make_roles=lambda *given: make[given](), guided=guided, sampler=toy.sampler, shift=1.0)
    one = Disback.prepare(settings, bench)
    teacher, node_1, node_2 = (toy.roles[name] for name in ("teacher", f"{NODE}1", f"{NODE}2"))
    assert sorted(asked, key=lambda each: str(each[1])) == [(node_2, 1.5), (node_1, 1.5), (teacher, None)]
    assert [matcher.teacher.denoiser for matcher in one.matchers] == [node_2, node_1, teacher]


def test_the_critic_starts_where_the_path_ended_with_a_fresh_optimizer(tmp_path: Path):
    one = method(config(tmp_path))
    loop = make_loop(one, one.config)
    for _ in range(7):
        loop.one_step()
    assert loop.optimizers["critic"].renewed_at == 6
    noted = run(method(config(tmp_path / "again")))
    words = [(step, what) for step, what, *_ in noted if step == 6]
    assert words == [(6, f"renew critic like {NODE}3"), (6, "student"), (6, "critic")]


def test_without_degradation_it_is_dmd2(tmp_path: Path):
    one = method(DisbackConfig(teacher="tiny", out=str(tmp_path / "a"), max_steps=6, degradation_steps=0, **COMMON))
    plain = Dmd2Config(teacher="tiny", out=str(tmp_path / "b"), max_steps=6, **COMMON)
    roles = method(one.config).roles
    other = Dmd2(plain, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), one.sampler)
    make_loop(one, one.config).run()
    make_loop(other, plain).run()
    for name in ("student", "critic"):
        assert torch.equal(weights_of(one, name), weights_of(other, name))


@pytest.mark.parametrize("settings", [{"swiftbrush": True}, {"decoupled": "none", "critic_loss": "x0"}], ids=str)
def test_what_dmd2_can_do_it_can_do_on_the_way_back(tmp_path: Path, settings: dict):
    noted = run(method(config(tmp_path, **settings)))
    assert [what for step, what, *_ in noted if step == 8] == ["student", "critic"]


@every_kind_of_teacher
def test_every_kind_of_teacher_goes_there_and_back(tmp_path: Path, schedule: NoiseSchedule, kind: str):
    one = method(config(tmp_path), schedule, kind)
    before = {name: weights_of(one, name) for name in one.roles}
    make_loop(one, one.config).run()
    moved = {name for name in one.roles if not torch.equal(weights_of(one, name), before[name])}
    assert moved == one.roles.keys() - {"teacher"}


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [3, 6, 9])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, stopped: int):
    whole = method(config(tmp_path / "whole"))
    make_loop(whole, whole.config).run()
    first = method(config(tmp_path / "parts"))
    loop = make_loop(first, first.config)
    for _ in range(stopped):
        loop.one_step()
    loop._save()
    second = method(config(tmp_path / "parts"))
    loop = make_loop(second, second.config)
    loop.resume()
    loop.run()
    for name in whole.roles:
        assert torch.equal(weights_of(whole, name), weights_of(second, name)), name


def recorded(out: Path) -> Disback:
    """A run that has recorded a path and nothing else."""
    one = method(config(out, max_steps=6))
    make_loop(one, one.config).run()
    return one


class Recorded:
    """What is asked of a recording when a run's folder is given."""

    prediction_type = "flow"


def test_another_run_goes_back_over_a_recorded_path(tmp_path: Path):
    first = recorded(tmp_path / "first")
    second = method(config(tmp_path / "second", recorded=True, init=str(tmp_path / "first")))
    initialize(second.roles, second.config.init, Recorded(), lambda _line: None)
    for name in node_names(second.config):
        assert torch.equal(weights_of(second, name), weights_of(first, name))
    noted = run(second)
    assert [what for step, what, *_ in noted if step == 0] == [f"renew critic like {NODE}3", "student", "critic"]


@pytest.mark.parametrize("steps", [[3, 6], [1, 2, 3, 6]], ids=["fewer", "more"])
def test_a_path_of_other_nodes_is_refused(tmp_path: Path, steps: list[int]):
    recorded(tmp_path / "first")
    second = method(config(tmp_path / "second", recorded=True, init=str(tmp_path / "first"), record_steps=steps))
    with pytest.raises(UserError, match=f"a path of 3 nodes and this run asks for {len(steps)}"):
        initialize(second.roles, second.config.init, Recorded(), lambda _line: None)


def test_a_run_without_a_path_is_refused_where_one_is_wanted_and_taken_as_a_start_where_none_is(tmp_path: Path):
    plain = method(config(tmp_path / "first", degradation_steps=0, record_steps=None, node_steps=None))
    make_loop(plain, plain.config).run()
    second = method(config(tmp_path / "second", recorded=True, init=str(tmp_path / "first")))
    with pytest.raises(UserError, match="a path of 0 nodes and this run asks for 3"):
        initialize(second.roles, second.config.init, Recorded(), lambda _line: None)
    said: list[str] = []
    third = method(config(tmp_path / "third", init=str(tmp_path / "first")))
    initialize(third.roles, third.config.init, Recorded(), said.append)
    assert torch.equal(weights_of(third, "student"), weights_of(plain, "student"))
    assert not any("node" in line for line in said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"record_steps": [2, 4]}, "must ascend from 1 or more to the last of --degradation_steps 6"),
        ({"record_steps": [4, 2, 6]}, "must ascend"),
        ({"record_steps": [0, 6]}, "must ascend"),
        ({"record_steps": [2, 2, 6]}, "must ascend"),
        ({"record_steps": []}, "must ascend"),
        ({"degradation_steps": -1}, "degradation_steps"),
        ({"node_steps": 0}, "node_steps"),
        ({"node_steps": 4}, "end before the teacher is the target"),
        ({"max_steps": 5}, "end before the teacher is the target"),
        ({"degradation_steps": 0, "record_steps": None}, "node_steps.* belongs to a path"),
        ({"degradation_steps": 0, "node_steps": None, "record_steps": [1]}, "must ascend"),
        ({"recorded": True}, "--recorded takes the path of another run"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


# --- where the answer is known ----------------------------------------------------------------------------------------


class Line(nn.Module):
    """The exact x0 of N(m, s^2) under flow matching, of which m and log s are trained."""

    def __init__(self, mean: float = 1.0, std: float = 0.8) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std).log())

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).to(x.dtype).reshape(-1, 1)
        alpha, variance = 1 - t, self.log_std.exp() ** 2
        gain = alpha * variance / (alpha**2 * variance + t**2)
        return self.mean + gain * (x - alpha * self.mean)


def test_the_nodes_of_a_gaussian_lead_from_the_teacher_to_what_the_student_makes(tmp_path: Path):
    """At t = 1 such a network says m whatever it sees: the student makes a point, which is the critic's fixed point."""
    settings = config(
        tmp_path, steps=1, max_steps=300, degradation_steps=300, record_steps=[75, 150, 225, 300], node_steps=None
    )
    settings = DisbackConfig(**{**settings.as_dict(), "batch_size": 32, "critic_lr": 0.02, "log_steps": 300})
    one = method(settings, kind="sample", network=Line)
    make_loop(one, settings, (1,), conditions=Labels(None)).run()
    stds = [one.roles[name].denoiser.network.log_std.exp().item() for name in node_names(settings)]
    means = [one.roles[name].denoiser.network.mean.item() for name in node_names(settings)]
    assert 0.8 > stds[0] > stds[1] > stds[2] > stds[3]
    assert stds[0] > 0.25  # 0.30, and 0.15 at the end
    assert stds[3] < 0.18
    assert all(abs(mean - 1.0) < 0.05 for mean in means)


@pytest.mark.parametrize(
    "steps", [pytest.param(900, id="short"), pytest.param(2400, id="long", marks=pytest.mark.soak)]
)
def test_a_student_of_a_mixture_comes_back_to_draw_from_it(tmp_path: Path, steps: int):
    settings = DisbackConfig(
        teacher="mixture",
        out=str(tmp_path),
        report_to="none",
        sample_steps=0,
        steps=2,
        max_steps=steps,
        degradation_steps=steps // 6,
        record_steps=[steps // 18, steps // 9, steps // 6],
        node_steps=steps // 9,
        batch_size=64,
        lr=2e-3,
        critic_lr=5e-3,
        critic_updates=3,
        log_steps=steps,
        checkpointing_steps=steps,
    )
    one = method(settings, kind="sample", network=MixtureTeacher)
    before = distance_of_walk(one.roles["student"], one.sampler)
    make_loop(one, settings, (2,), conditions=Labels(None)).run()
    after = distance_of_walk(one.roles["student"], one.sampler)
    assert before > 0.5
    assert after < 0.15
