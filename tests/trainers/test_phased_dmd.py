"""Phased DMD's own class on small real networks, in the real loop: phases, renewal, routing, and resume."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import Asked, Labels, make_loop

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.errors import UserError
from fewstep.networks.roles import Role
from fewstep.training.method import Renew, Turn
from tests.checkpoints import load_latest
from tests.trainers.toy_phased_dmd import KINDS, config, method


def batch(step: int, size: int = 4) -> Batch:
    return Batch(size, (6,), Labels().batch(0, range(size)), Draws(0, step, range(size)), None, logging=False)


def weights(one: Role) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in one.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def of(phase: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if f"phase_{phase}." in name}


# --- the order of things ----------------------------------------------------------------------------------------------


def test_phases_are_trained_one_after_the_other_noisiest_first(tmp_path: Path):
    one = method(config(tmp_path, max_steps=12, phases=[1, 2, 1], phase_steps=4, critic_updates=3))
    played = [[type(t).__name__ + " " + t.role for t in one.turns(step, batch(step))] for step in range(12)]
    student, critic = ["Turn student", "Turn critic"], ["Turn critic"]
    renewed = ["Renew critic", "Renew student"]
    first = [student, critic, critic, student]
    assert played == [*first, renewed + student, critic, critic, student, renewed + student, critic, critic, student]


def test_the_last_phase_takes_what_steps_are_left(tmp_path: Path):
    one = method(config(tmp_path, max_steps=100, phase_steps=10))
    assert [one.place(step) for step in (0, 9, 10, 11, 99)] == [(0, 0), (0, 9), (1, 0), (1, 1), (1, 89)]
    assert config(tmp_path, max_steps=101).resolved().phase_steps == 50
    assert config(tmp_path, phases=[1, 1, 1, 1], max_steps=6).resolved().phase_steps == 1


def test_in_alternating_order_every_phase_has_its_own_critic(tmp_path: Path):
    one = method(config(tmp_path, order="alternating", critic_updates=2))
    played = [[t.role for t in one.turns(step, batch(step))] for step in range(6)]
    both = [["student", "critic"], ["student", "critic_2"]]
    assert played == [*both, ["critic"], ["critic_2"], *both]
    before = weights(one.roles["student"])
    make_loop(one, one.config).run()
    after = weights(one.roles["student"])
    assert not any(equal(of(k, before), of(k, after)) for k in (1, 2))


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_a_turn_reaches_the_expert_of_its_phase_and_nothing_else(tmp_path: Path, renoise: str):
    one = method(config(tmp_path, critic_updates=1, renoise=renoise))
    for step in (0, 4, 5):
        turns = [turn for turn in one.turns(step, batch(step)) if isinstance(turn, Turn)]
        (x0, gradient), (loss, _) = turns[0].backward[0], turns[1].backward[0]
        assert not gradient.requires_grad
        found = {}
        for name, owner in one.roles.items():
            parameters = [p.requires_grad_() for p in owner.weights.parameters()]
            for tensor, grad, turn in ((x0, gradient, "student"), (loss, None, "critic")):
                got = torch.autograd.grad(tensor, parameters, grad, allow_unused=True, retain_graph=True)
                for (key, _), g in zip(owner.weights.named_parameters(), got, strict=True):
                    if g is not None:
                        found.setdefault(turn, set()).add((name, key.partition(".")[0]))
        assert found["student"] == {("student", f"phase_{1 + (step >= 4)}")}
        assert {name for name, _ in found["critic"]} == {"critic"}


def test_finished_experts_stay_as_they_are(tmp_path: Path):
    one = method(config(tmp_path, phase_steps=4, adam_weight_decay=0.1))
    start = weights(one.roles["student"])
    seen = []
    loop = make_loop(one, one.config)
    advance = loop.monitor.advance
    loop.monitor.advance = lambda step: (seen.append(weights(one.roles["student"])), advance(step))[1]
    loop.run()
    assert not equal(of(1, seen[3]), of(1, start))
    assert all(equal(of(1, state), of(1, seen[3])) for state in seen[4:])
    assert all(equal(of(2, state), of(2, start)) for state in seen[:4])
    assert not equal(of(2, seen[-1]), of(2, start))


def test_teacher_and_critic_look_at_noisier_samples_than_those_at_the_phases_end(tmp_path: Path):
    """Nested: up to pure noise also where a phase starts later."""
    one = method(config(tmp_path, phases=[1, 1, 2], time_margin=0.05))
    for number, anchor in enumerate([0.75, 0.5, None]):
        for renoisers, top in ((one.compared, 0.98), (one.learnt, 1.0)):
            times = torch.cat([renoisers[number].times(Draws(0, s, range(64)), "t") for s in range(10)])
            low = 0.8 if anchor == 0.75 else 0.55 if anchor else 0.0
            assert low <= times.min() <= low + 0.05
            assert top - 0.05 <= times.max() <= top


def test_early_phases_may_be_judged_at_noisier_times_than_their_end_asks_for(tmp_path: Path):
    """Where a teacher's noisier network ends is no end of a phase; the last phase knows no such bound."""
    one = method(config(tmp_path, phases=[2, 2], early_time_min=0.7))
    for renoisers in (one.compared, one.learnt):
        early, last = (torch.cat([r.times(Draws(0, s, range(64)), "t") for s in range(10)]) for r in renoisers)
        assert 0.7 <= early.min() <= 0.72
        assert last.min() < 0.1
        assert renoisers[0].anchor == one.phases[0].anchor


def test_a_bound_that_leaves_no_time_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="time_max"):
        method(config(tmp_path, phases=[2, 2], early_time_min=0.99))
    with pytest.raises(UserError, match="early_time_min"):
        config(tmp_path, early_time_min=1.5)


def test_each_phases_critic_learns_up_to_pure_noise_and_is_compared_at_the_times_that_were_set(tmp_path: Path):
    """In the steps themselves; both begin at the end of the phase, and where there is none, each at its own time."""
    one = method(config(tmp_path, phase_steps=4, critic_updates=1, time_min=0.1, time_max=0.8, time_margin=0.05))
    near = partial(pytest.approx, abs=0.01)
    for first, low, cleanest in ((0, 0.55, 0.55), (4, 0.1, 1e-3)):
        asked = Asked(one.roles["critic"], one.roles["teacher"])
        for step in range(first, first + 4):
            for _ in one.turns(step, batch(step, size=512)):
                pass
        assert asked.span("teacher", trained=False) == asked.span("critic", trained=False) == (near(low), near(0.8))
        assert asked.span("critic", trained=True) == (near(cleanest), near(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_margin_every_sample_still_gets_noise(tmp_path: Path, kind: str):
    """The paper's own range, (s, 1); a table has few entries, and none may be drawn that is the anchor itself."""
    one = method(config(tmp_path, time_margin=0.0, weight_cap=0.0), kind)
    times = one.learnt[0].times(Draws(0, 0, range(20000)), "t")
    assert one.phases[0].anchor < float(times.min()) <= one.phases[0].anchor + 2e-3
    make_loop(one, one.config).run()


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_samples_arrive_at_the_end_of_their_phase_from_each_of_its_steps(tmp_path: Path, renoise: str):
    """What the critic is shown is what the next phase starts from."""
    one = method(config(tmp_path, renoise=renoise))
    x0, x_t, given = torch.randn(4, 6), torch.randn(4, 6), batch(0)
    for last, t in ((0, 1.0), (1, 0.75)):
        given.draws._names.clear()
        x_s = one.arrive(x0, x_t, last, one.phases[0], given)
        given.draws._names.clear()
        noise = (x_t - (1 - t) * x0) / t if renoise == "ode" else given.draws.normal("arrival_noise", (6,))
        torch.testing.assert_close(x_s, 0.5 * x0 + 0.5 * noise)
    assert one.arrive(x0, x_t, 3, one.phases[1], given) is x0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_teacher_trains_every_expert(tmp_path: Path, kind: str):
    one = method(config(tmp_path, critic_updates=2), kind)
    before = weights(one.roles["student"])
    make_loop(one, one.config).run()
    after = weights(one.roles["student"])
    assert not any(equal(of(k, before), of(k, after)) for k in (1, 2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


# --- renewal ----------------------------------------------------------------------------------------------------------


def test_a_new_phase_has_a_new_critic_and_starts_warming_up_again(tmp_path: Path):
    one = method(config(tmp_path, phase_steps=4, critic_updates=2, lr_warmup_steps=3, ema_decay=0.5))
    loop = make_loop(one, one.config)
    states = []
    for name, optimizer in loop.optimizers.items():

        def watched(step: int, averages, name=name, optimizer=optimizer, update=optimizer.update) -> Tensor:
            steps = {int(v) for key, v in optimizer.state().items() if key.endswith("/step")}
            states.append((step, name, equal(weights(one.roles["critic"]), weights(one.roles["teacher"])), steps))
            norm = update(step, averages)
            states[-1] += (optimizer.rule.lr,)
            return norm

        optimizer.update = watched
    loop.run()
    critic = {step: (like_teacher, steps, lr) for step, name, like_teacher, steps, lr in states if name == "critic"}
    assert [step for step, (like, _, _) in critic.items() if like] == [0, 4]
    assert critic[4][1] == set()  # no momentum
    assert critic[3][1] == {3}
    assert [round(lr / 1e-2, 2) for _, _, lr in critic.values()] == [0.25, 0.5, 0.75, 1.0] * 2
    student = {step: lr for step, name, _, _, lr in states if name == "student"}
    assert [round(lr / 1e-2, 2) for lr in student.values()] == [0.25, 0.75, 0.25, 0.75]


def test_a_finished_expert_gives_way_to_its_average(tmp_path: Path):
    one = method(config(tmp_path, phase_steps=4, max_steps=6, ema_decay=0.9, critic_updates=1))
    loop, kept = make_loop(one, one.config), []
    advance = loop.monitor.advance
    loop.monitor.advance = lambda step: (
        kept.append([weights(one.roles[n]) for n in ("student", "ema")]),
        advance(step),
    )
    loop.run()
    raw, average = kept[3]
    assert not equal(of(1, raw), of(1, average))
    for student, ema in kept[4:]:  # what is walked through is what will be shipped
        assert equal(of(1, student), of(1, average))
        assert equal(of(1, ema), of(1, average))
    assert not equal(of(2, kept[-1][0]), of(2, kept[-1][1]))


@pytest.mark.parametrize("stop", [3, 4, 6])  # before a phase ends, when it has ended, and after
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, stop: int):
    settings = {"phase_steps": 4, "ema_decay": 0.9, "lr_warmup_steps": 2, "critic_updates": 2, "checkpointing_steps": 1}
    whole = method(config(tmp_path / "whole", **settings))
    make_loop(whole, whole.config).run()
    first = method(config(tmp_path / "parts", **{**settings, "max_steps": max(stop, 5)}))
    loop = make_loop(first, first.config)
    first.config.max_steps = stop
    loop.run()
    again = method(config(tmp_path / "parts", **settings))
    loop = make_loop(again, again.config)
    loop.resume()
    loop.run()
    (ours_state, ours), (theirs_state, theirs) = (
        load_latest(tmp_path / name / "checkpoints") for name in ("parts", "whole")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours_state["renewed_at"] == theirs_state["renewed_at"] == {"student": 4, "critic": 4}


def test_micro_batches_add_up_to_their_batch(tmp_path: Path):
    settings = {"phase_steps": 4, "critic_updates": 2, "max_steps": 6}
    runs = {"whole": {"batch_size": 4}, "parts": {"batch_size": 2, "gradient_accumulation_steps": 2}}
    states = []
    for name, more in runs.items():
        one = method(config(tmp_path / name, **settings, **more))
        make_loop(one, one.config).run()
        states.append(one.roles["student"].state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_renewal_comes_before_anything_is_computed(tmp_path: Path):
    one = method(config(tmp_path, phase_steps=4, ema_decay=0.9))
    calls: list[int] = []
    for player in (one.roles["teacher"], one.roles["critic"]):
        player.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    turns = one.turns(4, batch(4))
    assert [next(turns), next(turns)] == [Renew("critic", like="teacher"), Renew("student", like="ema")]
    assert calls == []


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phases": [2, 1]}, r"--phases \[2, 1\] do not cover the student's 4 steps"),
        ({"phases": []}, "do not cover"),
        ({"steps": 2, "phases": [2, 2]}, "do not cover the student's 2 steps"),
        ({"phase_steps": 8}, "end before the last of 2 phases of --phase_steps 8 begins"),
        ({"phase_steps": 0}, "--phase_steps 0"),
        ({"order": "random"}, "must be one of sequential, alternating"),
        ({"order": "alternating", "phase_steps": 4}, "belongs to --order sequential"),
        ({"data": "images"}, "leave out --data: it is used by no part of Phased DMD"),
        ({"time_margin": -0.1}, "time_margin must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_a_phase_without_room_above_its_end_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a phase that ends at t = 0\.97 leaves no noisier times to compare at"):
        method(config(tmp_path, steps=2), grid=(1.0, 0.97))


def test_options_of_another_method_are_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="gan_weight"):
        config(tmp_path, gan_weight=0.1)
