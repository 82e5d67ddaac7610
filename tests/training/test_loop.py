"""The training loop: who gets updated by what, averages, warm-up, and starting over."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TinyMethod, TinyNetwork, make_loop, role

from fewstep.networks.roles import follow
from fewstep.training.loop import sampling_role
from fewstep.training.method import Renew, Turn
from tests.checkpoints import load_latest
from tests.training.loop_runs import Watched, config, rows, run, weights

# --- turns -----------------------------------------------------------------------------------------------------------


def test_a_turn_changes_its_own_role_and_no_other(tmp_path: Path):
    method = Watched()
    run(tmp_path, method)
    after = [before for _, _, before in method.history[1:]] + [{n: weights(r) for n, r in method.roles.items()}]
    assert len(method.history) == 6 + 3
    for (_, mover, before), now in zip(method.history, after):
        changed = {name for name in before if not torch.equal(before[name], now[name])}
        assert changed == {mover}


def test_no_gradient_is_left_on_any_role(tmp_path: Path):
    method = TinyMethod()
    run(tmp_path, method)
    assert all(p.grad is None for role in method.roles.values() for p in role.denoiser.network.parameters())


def test_other_roles_gradients_are_none_while_a_turn_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method = TinyMethod()
    loop = make_loop(method, config(tmp_path))
    seen = []
    for name, optimizer in loop.optimizers.items():

        def watched(step: int, averages, name=name, update=optimizer.update) -> Tensor:
            owners = {n for n, r in method.roles.items() for p in r.denoiser.network.parameters() if p.grad is not None}
            seen.append((name, owners))
            return update(step, averages)

        monkeypatch.setattr(optimizer, "update", watched)
    loop.run()
    assert len(seen) == 9
    assert all(owners == {name} for name, owners in seen)


def test_turns_are_counted_as_the_method_says(tmp_path: Path):
    method = Watched()
    run(tmp_path, method, max_steps=10)
    assert Counter(role for _, role, _ in method.history) == {"student": 5, "critic": 10}


def test_a_role_that_gets_no_gradient_at_all_is_an_error(tmp_path: Path):
    class Absent(TinyMethod):
        def turns(self, step, batch):
            yield Turn("critic", [(next(iter(self.roles["student"].parameters())).sum(), None)])

    with pytest.raises(RuntimeError, match=r"critic|not have been used"):
        run(tmp_path, Absent())


# --- the student's followers -----------------------------------------------------------------------------------------


class Targeted(Watched):
    """With a target that moves by a function of the step."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.roles["target"] = role("target", TinyNetwork(6), self.schedule, "flow", trainable=False)
        follow(self.roles)

    def target_decay(self, step: int) -> float:
        return 0.5 + 0.1 * step


def test_the_target_follows_the_student_by_the_methods_own_decay(tmp_path: Path):
    method = Targeted()
    run(tmp_path, method, max_steps=4)
    student_turns = [(step, before) for step, name, before in method.history if name == "student"]
    assert [step for step, _ in student_turns] == [0, 2]
    after = [before for step, name, before in method.history if name == "critic" and step % 2 == 0]
    for (step, before), now in zip(student_turns, after):
        expected = torch.lerp(before["target"], now["student"], 1 - method.target_decay(step))
        torch.testing.assert_close(now["target"], expected)


def test_the_target_is_kept_in_checkpoints(tmp_path: Path):
    whole, parts, again = Targeted(), Targeted(), Targeted()
    again.roles["target"].copy_weights(again.roles["critic"])
    run(tmp_path / "whole", whole, max_steps=5)
    run(tmp_path / "parts", parts, max_steps=3)
    loop = make_loop(again, config(tmp_path / "parts", max_steps=5))
    loop.resume()
    loop.run()
    assert torch.equal(weights(again.roles["target"]), weights(whole.roles["target"]))
    assert not torch.equal(weights(whole.roles["target"]), weights(whole.roles["student"]))


def test_a_student_that_starts_over_takes_its_target_along(tmp_path: Path):
    class Renewing(Targeted):
        def turns(self, step, batch):
            if step == 2:
                yield Renew("student", like="critic")
                assert torch.equal(weights(self.roles["target"]), weights(self.roles["critic"]))
            yield from super().turns(step, batch)

    run(tmp_path, Renewing(), max_steps=3)


# --- optimization ----------------------------------------------------------------------------------------------------


def test_learning_rates_warm_up_linearly_and_stay(tmp_path: Path):
    method = TinyMethod(lr=1e-2)
    loop = make_loop(method, config(tmp_path, max_steps=6, lr_warmup_steps=3))
    rates = []
    update = loop.optimizers["critic"].update

    def watched(step: int, averages) -> Tensor:
        norm = update(step, averages)
        rates.append(loop.optimizers["critic"].rule.lr)
        return norm

    loop.optimizers["critic"].update = watched
    loop.run()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_gradients_are_clipped_each_role_by_itself(tmp_path: Path):
    bound = 1e-3
    loop = run(tmp_path / "clipped", max_steps=1, max_grad_norm=bound, adam_beta1=0.5)
    free = run(tmp_path / "free", max_steps=1, max_grad_norm=0, adam_beta1=0.5)
    loose = run(tmp_path / "loose", max_steps=1, max_grad_norm=1e6, adam_beta1=0.5)
    for name in ("student", "critic"):
        # After one step AdamW's first moment is (1 - beta1) times the gradient that it was given.
        given, whole, untouched = (
            torch.cat([v.flatten() for key, v in run_.optimizers[name].state().items() if key.endswith("/exp_avg")])
            / 0.5
            for run_ in (loop, free, loose)
        )
        assert given.norm().item() == pytest.approx(bound, rel=1e-3)
        assert torch.equal(untouched, whole)
        torch.testing.assert_close(given / given.norm(), whole / whole.norm(), rtol=1e-4, atol=1e-6)
        assert rows(tmp_path / "clipped")[0][f"{name}/gradient_norm"] == pytest.approx(whole.norm().item(), rel=1e-5)


def test_the_average_follows_the_student_and_is_what_is_sampled(tmp_path: Path):
    method = Watched(ema=True)
    expected = weights(method.roles["student"])
    run(tmp_path, method, ema_decay=0.7)
    # The weights after a student's turn are those before the critic's turn of the same step.
    for step, mover, before in method.history:
        if mover == "critic" and step % 2 == 0:
            expected = 0.7 * expected + 0.3 * before["student"]
    torch.testing.assert_close(weights(method.roles["ema"]), expected, rtol=1e-5, atol=1e-7)
    assert sampling_role(method.roles) is method.roles["ema"]
    assert sampling_role(TinyMethod().roles).name == "student"


# --- starting a role over --------------------------------------------------------------------------------------------


class RenewStudent(Watched):
    """Before step 3 the student starts over like the teacher."""

    def turns(self, step, batch):
        if step == 3:
            yield Renew("student", like="teacher")
            self.renewed = {name: weights(role) for name, role in self.roles.items()}
        yield from super().turns(step, batch)


def test_renew_resets_weights_momenta_average_and_warm_up(tmp_path: Path):
    method = RenewStudent(ema=True)
    loop = make_loop(method, config(tmp_path, max_steps=4, lr_warmup_steps=5, ema_decay=0.5))
    loop.run()
    for name in ("student", "ema"):
        assert torch.equal(method.renewed[name], weights(method.roles["teacher"]))
    assert not torch.equal(method.renewed["critic"], weights(method.roles["teacher"]))
    # Step 3 has no turn of the student, so its optimizer is as fresh as after the renewal.
    student, critic = loop.optimizers["student"], loop.optimizers["critic"]
    assert not student.state()
    assert critic.state()
    assert (student.renewed_at, critic.renewed_at) == (3, 0)
    student.held.own[0].grad = torch.ones_like(student.held.own[0])
    student.update(4)
    assert student.rule.lr == pytest.approx(1e-3 * 2 / 6)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_renewed_role_survives_a_checkpoint(tmp_path: Path, stop: int):
    settings = {"lr_warmup_steps": 5, "ema_decay": 0.5}
    whole = RenewStudent(ema=True)
    run(tmp_path / "whole", whole, max_steps=8, **settings)
    run(tmp_path / "parts", RenewStudent(ema=True), max_steps=stop, **settings)
    resumed = RenewStudent(ema=True)
    for name in ("student", "critic", "ema"):
        resumed.roles[name].copy_weights(TinyMethod(seed=99).roles["teacher"])
    loop = make_loop(resumed, config(tmp_path / "parts", max_steps=8, **settings))
    loop.resume()
    loop.run()
    for name in ("student", "critic", "ema"):
        assert torch.equal(weights(resumed.roles[name]), weights(whole.roles[name]))
    states = [load_latest(tmp_path / part / "checkpoints")[1] for part in ("whole", "parts")]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
