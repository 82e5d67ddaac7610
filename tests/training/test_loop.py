"""The training loop: who gets updated by what, averages, warm-up, starting over, stopping, and what it never reads."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import TinyMethod, TinyNetwork, make_loop, role

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.networks.roles import Role, follow
from fewstep.training import checkpoint
from fewstep.training.distributed import Processes
from fewstep.training.loop import Interrupted, Loop, sampling_role
from fewstep.training.method import Renew, Turn


def config(out: Path, **settings) -> RunConfig:
    defaults = {"max_steps": 6, "batch_size": 4, "log_steps": 1, "checkpointing_steps": 100, "report_to": "none"}
    return RunConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def weights(role: Role) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in role.denoiser.network.parameters()])


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Watched(TinyMethod):
    """Notes every role's weights before each turn and after the last."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.history: list[tuple[int, str, dict[str, Tensor]]] = []

    def turns(self, step, batch):
        for turn in super().turns(step, batch):
            before = {name: weights(role) for name, role in self.roles.items()}
            yield turn
            self.history.append((step, type(turn).__name__ if isinstance(turn, Renew) else turn.role, before))


def run(out: Path, method: TinyMethod | None = None, **settings) -> Loop:
    loop = make_loop(method or TinyMethod(), config(out, **settings))
    loop.run()
    return loop


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

        def watched(step: int, name=name, update=optimizer.update) -> Tensor:
            owners = {n for n, r in method.roles.items() for p in r.denoiser.network.parameters() if p.grad is not None}
            seen.append((name, owners))
            return update(step)

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

    def watched(step: int) -> Tensor:
        norm = update(step)
        rates.append(loop.optimizers["critic"].adamw.param_groups[0]["lr"])
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
            torch.cat([state["exp_avg"].flatten() for state in run_.optimizers[name].adamw.state.values()]) / 0.5
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
    assert not student.adamw.state
    assert critic.adamw.state
    assert (student.renewed_at, critic.renewed_at) == (3, 0)
    student.parameters[0].grad = torch.ones_like(student.parameters[0])
    student.update(4)
    assert student.adamw.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 6)


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
    states = [checkpoint.load_latest(tmp_path / part / "checkpoints")[1] for part in ("whole", "parts")]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "step", "kept"), [("student", 4, 4), ("critic", 4, 4), ("critic", 3, 2), ("critic", 0, 0)]
)
def test_a_gradient_that_is_not_finite_stops_the_run_and_spoils_nothing(
    tmp_path: Path, role: str, step: int, kept: int
):
    method = Watched(poison=(role, step), ema=True)
    loop = make_loop(method, config(tmp_path, max_steps=20, log_steps=7, checkpointing_steps=2, ema_decay=0.9))
    with pytest.raises(UserError, match=rf"gradient of the {role} was not finite in step {step}\b") as caught:
        loop.run()
    assert "\n" not in str(caught.value)
    assert f"checkpoint of step {kept} kept" in str(caught.value)
    state, tensors = checkpoint.load_latest(tmp_path / "checkpoints")
    assert state["step"] == kept
    assert all(torch.isfinite(value).all() for values in tensors.values() for value in values.values())
    before = next(before for at, name, before in method.history if (at, name) == (step, role))
    assert torch.equal(weights(method.roles[role]), before[role])
    assert all(torch.isfinite(weights(one)).all() for one in method.roles.values())


def test_a_stopped_run_can_be_resumed_from_the_kept_checkpoint(tmp_path: Path):
    whole = TinyMethod()
    run(tmp_path / "whole", whole)
    settings = {"checkpointing_steps": 2}
    with pytest.raises(UserError):
        run(tmp_path / "stopped", TinyMethod(poison=("critic", 3)), **settings)
    resumed = TinyMethod()
    loop = make_loop(resumed, config(tmp_path / "stopped", **settings))
    loop.resume()
    loop.run()
    assert torch.equal(weights(resumed.roles["student"]), weights(whole.roles["student"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_gives_the_handlers_back(tmp_path: Path, number: int):
    class Interrupting(TinyMethod):
        def turns(self, step, batch):
            if step == 2:
                os.kill(os.getpid(), number)
            yield from super().turns(step, batch)

    handler = signal.getsignal(number)
    method = Interrupting()
    with pytest.raises(Interrupted):
        run(tmp_path, method)
    assert signal.getsignal(number) is handler
    state, tensors = checkpoint.load_latest(tmp_path / "checkpoints")
    assert state["step"] == 3
    torch.testing.assert_close(tensors["critic"], method.roles["critic"].state_dict(), rtol=0, atol=0)


def test_another_methods_checkpoint_is_refused(tmp_path: Path):
    run(tmp_path, max_steps=1)
    other = make_loop(TinyMethod(), config(tmp_path), name="other")
    with pytest.raises(UserError, match="written by tiny, not other"):
        other.resume()


def test_another_number_of_processes_is_refused(tmp_path: Path):
    run(tmp_path, max_steps=1)
    other = make_loop(TinyMethod(), config(tmp_path))
    other.processes = Processes(rank=0, count=2)
    with pytest.raises(UserError, match="written by 1 processes, not 2"):
        other.resume()


def test_weights_of_another_teacher_are_refused_by_name(tmp_path: Path):
    run(tmp_path, max_steps=1)
    method = TinyMethod()
    method.roles["student"].denoiser.network.outer = torch.nn.Linear(5, 6)
    with pytest.raises(ValueError, match=r"student\.network do not fit"):
        make_loop(method, config(tmp_path)).resume()


# --- what it says ----------------------------------------------------------------------------------------------------


def test_steps_are_logged_as_asked_and_the_first_and_last_always(tmp_path: Path):
    run(tmp_path, max_steps=11, log_steps=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 4, 8, 11]


def test_resuming_cuts_the_log_at_the_checkpoint_and_forgets_a_line_cut_short(tmp_path: Path):
    run(tmp_path, max_steps=4)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 5, "seconds": 1.0}\n{"step": 6, "sec')
    loop = make_loop(TinyMethod(), config(tmp_path, max_steps=6))
    loop.resume()
    loop.run()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all("critic/denoising" in row for row in rows(tmp_path))


def test_a_run_that_broke_off_between_two_log_lines_goes_on_with_the_same_lines(tmp_path: Path):
    class Breaking(TinyMethod):
        def turns(self, step, batch):
            if step == 3:
                raise MemoryError
            yield from super().turns(step, batch)

    settings = {"log_steps": 4, "checkpointing_steps": 3, "max_steps": 8}
    run(tmp_path / "whole", **settings)
    with pytest.raises(MemoryError):
        run(tmp_path / "broken", Breaking(), **settings)
    loop = make_loop(TinyMethod(), config(tmp_path / "broken", **settings))
    loop.resume()
    loop.run()
    whole, broken = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / name)]
        for name in ("whole", "broken")
    )
    # The student's numbers of the line of step 4 were made in a step before the checkpoint.
    assert "student/matching" in whole[1]
    assert broken == whole


def test_samples_are_asked_for_when_due_and_at_the_end(tmp_path: Path):
    asked: list[int] = []
    loop = make_loop(TinyMethod(), config(tmp_path, max_steps=7, sample_steps=3), on_samples=asked.append)
    loop.run()
    assert asked == [3, 6, 7]


def test_logging_less_changes_no_weight(tmp_path: Path):
    often, seldom = TinyMethod(), TinyMethod()
    run(tmp_path / "often", often, log_steps=1)
    run(tmp_path / "seldom", seldom, log_steps=100)
    for name in ("student", "critic"):
        assert torch.equal(weights(often.roles[name]), weights(seldom.roles[name]))


_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


def test_nothing_is_read_back_from_the_device_in_a_step_that_does_not_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = make_loop(TinyMethod(ema=True), config(tmp_path, log_steps=5, max_steps=50, ema_decay=0.9))
    reads: list[str] = []

    def counted(name: str):
        original = getattr(Tensor, name)

        def read(self: Tensor, *args, **kwargs):
            caller = sys._getframe(1).f_code
            # Keyed draws are made on the CPU, wherever the roles live.
            if not caller.co_filename.endswith("draws.py"):
                reads.append(f"{name} in {caller.co_filename}:{caller.co_name}")
            return original(self, *args, **kwargs)

        return read

    for name in _READS:
        monkeypatch.setattr(Tensor, name, counted(name))
    by_step = []
    for _ in range(10):
        reads.clear()
        loop._one_step()
        by_step.append(list(reads))
    loop.monitor.close()
    logging = [bool(found) for found in by_step]
    assert logging == [True, False, False, False, True, False, False, False, False, True], by_step
