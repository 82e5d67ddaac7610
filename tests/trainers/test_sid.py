"""SiD's own class on small real networks: order, routing through teacher and critic, and settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TABLE, every_kind_of_teacher, make_loop, roles_that_move

from fewstep.data.batch import Batch
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.losses.score import native_weight
from fewstep.trainers.sid import Sid, critic_weight
from fewstep.training.method import Turn
from tests.trainers.toy_sid import ROLES, batch, config, step_with_last, vector_method

# --- order and number of updates --------------------------------------------------------------------------------------


def test_a_step_is_the_critic_and_then_the_student(tmp_path: Path):
    method = vector_method(config(tmp_path))
    assert [turn.role for turn in method.turns(0, batch(0))] == ["critic", "student"]


def test_the_student_moves_with_every_rth_update_of_the_critic_and_after_the_warm_up(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_updates=3, critic_warmup_steps=4))
    moved = [step for step in range(12) if len(list(method.turns(step, batch(step)))) == 2]
    assert moved == [5, 8, 11]


def test_both_turns_of_all_processes_and_micro_batches_judge_the_same_step(tmp_path: Path):
    method, calls = vector_method(config(tmp_path)), []
    method.roles["student"].denoiser.network.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    counts = Counter()
    for step in range(200):
        seen = set()
        for indices in (range(2), range(2, 4)):
            calls.clear()
            list(method.turns(step, batch(step, indices)))
            half = len(calls) // 2
            # Only the student's last call has a graph.
            assert calls == [False] * (2 * half - 1) + [True]
            seen.add(half)
        counts[seen.pop()] += 1
        assert not seen
    assert counts.keys() == {1, 2, 3, 4}
    assert min(counts.values()) > 30  # uniformly: 50 are expected


# --- the student's loss and where its gradient goes -------------------------------------------------------------------


def student_gradient(method: Sid, turn: Turn) -> list[Tensor]:
    (loss, _), *others = turn.backward
    assert others == []
    return list(torch.autograd.grad(loss, method.roles["student"].parameters(), retain_graph=True))


def by_hand(
    method: Sid,
    b: Batch,
    last: int,
    alpha: float,
    through: tuple[str, ...] = ("teacher", "critic"),
    walk: str = "student",
) -> Tensor:
    """The loss written out for a flow; with gradient through the networks named in ``through``."""
    shape = b.shape

    def step_noise(k: int) -> Tensor:
        return b.draws.normal(f"{walk}_walk_step_noise_{k}", shape)

    noise = b.draws.normal(f"{walk}_walk_noise", shape)
    x0 = rollout(method.roles["student"], method.sampler, noise, b.conditioning, step_noise, last)
    t = torch.sigmoid(torch.tensor(2.0).log() + 1.6 * b.draws.normal("student_time", ()).double())
    x_t = add_noise(x0, b.draws.normal("student_noise", shape), method.schedule.coefficients(t))
    inputs = {name: x_t if name in through else x_t.detach() for name in ("teacher", "critic")}
    p, q = (method.roles[name](x, t, b.conditioning) for name, x in inputs.items())
    weight = (1 - t).float().reshape(-1, 1)
    return (weight * (p - q) * ((p - x0) - alpha * (p - q))).mean()


@pytest.mark.parametrize("last", range(4))
def test_the_student_is_judged_at_the_drawn_step_of_its_own_walk(tmp_path: Path, last: int):
    """The mixture over all steps: each is the ordinary loss of SiD at that step's output."""
    method, step = vector_method(config(tmp_path, alpha=1.2)), step_with_last(last)
    turn = list(method.turns(step, batch(step)))[1]
    expected = by_hand(method, batch(step), last, 1.2)
    torch.testing.assert_close(turn.backward[0][0], expected)
    parameters = method.roles["student"].parameters()
    for ours, theirs in zip(student_gradient(method, turn), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("last", [0, 3])
def test_a_shared_walk_is_walked_once_and_judged_as_any_other(tmp_path: Path, last: int):
    """The student's turn is that of a student whose walk has the critic's draws."""
    settings = {"alpha": 1.2, "critic_dropout": 0.0}
    method, step = vector_method(config(tmp_path, **settings, shared_walk=True)), step_with_last(last)
    calls: list[bool] = []

    def note(x_t: torch.Tensor, t: torch.Tensor, early: bool):
        calls.append(torch.is_grad_enabled())
        return lambda _answer: None

    method.roles["student"].denoiser.on_call = note
    turn = list(method.turns(step, batch(step)))[1]
    assert calls == [False] * (last + 1) + [True]
    expected = by_hand(method, batch(step), last, 1.2, walk="critic")
    torch.testing.assert_close(turn.backward[0][0], expected)
    parameters = method.roles["student"].parameters()
    for ours, theirs in zip(student_gradient(method, turn), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs)


def test_a_shared_walk_is_refused_where_the_critic_is_told_negatives(tmp_path: Path):
    with pytest.raises(UserError, match="give --critic_dropout 0"):
        vector_method(config(tmp_path, shared_walk=True, guidance_scale=3.0, critic_guidance=2.0))


def test_the_gradient_goes_through_teacher_and_critic(tmp_path: Path):
    method, step = vector_method(config(tmp_path)), step_with_last(0)
    ours = student_gradient(method, list(method.turns(step, batch(step)))[1])
    for through in (("teacher",), ("critic",), ()):
        loss = by_hand(method, batch(step), 0, 1.0, through)
        theirs = torch.autograd.grad(loss, method.roles["student"].parameters())
        assert any(not torch.allclose(a, b, rtol=0.02, atol=0) for a, b in zip(ours, theirs))


def test_each_turn_gives_gradients_to_its_own_role_alone(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_guidance=0.5, guidance_scale=3.0))
    for parameter in method.roles["teacher"].denoiser.network.parameters():
        parameter.requires_grad_()  # even if it could have one
    loop = make_loop(method, method.config)
    generator = method.turns(0, batch(0))
    for name in ("critic", "student"):
        turn = next(generator)
        loop._backward(turn, 1.0)
        held = {n for n in ROLES for p in method.roles[n].denoiser.network.parameters() if p.grad is not None}
        assert held == {name} == {turn.role}
        assert all(not value.requires_grad for value in turn.log.values())
        for parameter in method.roles[name].parameters():
            parameter.grad = None


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
@every_kind_of_teacher
def test_every_kind_of_teacher_trains_both_roles(tmp_path: Path, schedule: NoiseSchedule, kind: str, renoise: str):
    method = vector_method(config(tmp_path, max_steps=3), schedule, kind, renoise)
    assert roles_that_move(method) == {"student", "critic"}


def test_the_critic_of_a_v_network_minimises_the_error_of_the_noise():
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    alpha, _ = TABLE.coefficients(t)
    expected = native_weight("v_prediction", TABLE, t) * alpha**2  # snr / (snr + 1) on the error of v
    torch.testing.assert_close(critic_weight("v_prediction", TABLE, t), expected)
    torch.testing.assert_close(critic_weight("epsilon", TABLE, t), expected)
    torch.testing.assert_close(critic_weight("flow", FlowSchedule(), t), t**-2)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"--alpha must be in \[0, 1.5\]"),
        ({"alpha": 1.6}, r"--alpha must be in \[0, 1.5\]"),
        ({"alpha": float("nan")}, "--alpha must be a finite number, not nan"),
        ({"weighting": "square"}, "--weighting must be one of auto, sid, none"),
        ({"guidance": "long"}, "--guidance must be one of long_short, zero, anti"),
        ({"guidance": "zero", "guidance_scale": 4.5}, "leave out --guidance_scale: it is fixed by --guidance zero"),
        ({"guidance": "anti", "critic_guidance": 0.0}, "leave out --critic_guidance: it is fixed by --guidance anti"),
        ({"critic_guidance": float("inf")}, "critic_guidance must be a finite number"),
        ({"critic_dropout": 1.0}, "critic_dropout"),
        ({"critic_updates": 0}, "critic_updates"),
        ({"critic_warmup_steps": -1}, "critic_warmup_steps"),
        ({"adversarial": "gan"}, "--adversarial must be one of none, diffusion_gan, sida"),
        ({"adversarial": "sida"}, "needs real images"),
        ({"data": "images"}, "leave out --data: it belongs to --adversarial diffusion_gan or sida"),
        ({"gan_weight": 1e-3}, "leave out --gan_weight: it belongs to --adversarial diffusion_gan or sida"),
        ({"gan_start_step": 5}, "leave out --gan_start_step"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("schedule", [TABLE, EDMSchedule()], ids=["table", "edm"])
def test_a_flows_weights_are_refused_for_other_teachers(tmp_path: Path, schedule: NoiseSchedule):
    with pytest.raises(UserError, match="1_minus_sigma belongs to flow-matching teachers"):
        vector_method(config(tmp_path, weighting="1_minus_sigma"), schedule, "sample")


def test_the_bound_of_a_weight_is_refused_for_another(tmp_path: Path):
    with pytest.raises(UserError, match="leave out --normalizer_min: it belongs to --weighting sid"):
        vector_method(config(tmp_path, normalizer_min=1e-3))  # a flow teacher's own weight is 1 - sigma
    assert vector_method(config(tmp_path, weighting="sid", normalizer_min=1e-3)).normalizer_min == 1e-3


def test_a_start_below_the_top_is_marginal_where_that_can_ship(tmp_path: Path):
    assert config(tmp_path, steps=1, first_timestep=625).resolved().start == "marginal"
    assert config(tmp_path, steps=4, first_timestep=625, renoise="ode").resolved().start == "marginal"
    assert config(tmp_path, steps=4, first_timestep=625).resolved().start == "noise"
    assert config(tmp_path, steps=1, first_timestep=625, start="noise").resolved().start == "noise"
    assert config(tmp_path, steps=1).resolved().start == "noise"
