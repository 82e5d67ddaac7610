"""How the training loop stops, by a gradient or a signal, and which checkpoints it goes on from."""

import os
import signal
from pathlib import Path

import pytest
import torch
from toys import TinyMethod, make_loop

from fewstep.errors import Interrupted, UserError
from fewstep.training import checkpoint
from tests.checkpoints import load_latest
from tests.training.loop_runs import Watched, config, rows, run, weights


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
    state, tensors = load_latest(tmp_path / "checkpoints")
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


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_as_if_nothing_had_been(tmp_path: Path):
    settings = {"checkpointing_steps": 2}
    whole = TinyMethod()
    run(tmp_path / "whole", whole, **settings)
    run(tmp_path / "broken", TinyMethod(), **settings)
    folder = tmp_path / "broken" / "checkpoints"
    (folder / "step_00000006" / "student.safetensors").write_bytes(b"half")
    resumed = TinyMethod()
    loop = make_loop(resumed, config(tmp_path / "broken", **settings))
    loop.resume()
    assert loop.step == 4
    loop.run()
    assert torch.equal(weights(resumed.roles["student"]), weights(whole.roles["student"]))
    assert [row["step"] for row in rows(tmp_path / "broken")] == [1, 2, 3, 4, 5, 6]
    found = checkpoint.find_latest(folder)
    assert (found.state["step"], found.note) == (6, "")


def test_a_stop_at_a_step_with_a_checkpoint_writes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupting(TinyMethod):
        def turns(self, step, batch):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from super().turns(step, batch)

    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: saved.append(given[1]) or save(*given))
    with pytest.raises(Interrupted):
        run(tmp_path, Interrupting(), checkpointing_steps=2)
    assert saved == [0, 2, 4]


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
    state, tensors = load_latest(tmp_path / "checkpoints")
    assert state["step"] == 3
    torch.testing.assert_close(tensors["critic"], method.roles["critic"].state_dict(), rtol=0, atol=0)


def test_another_methods_checkpoint_is_refused(tmp_path: Path):
    run(tmp_path, max_steps=1)
    other = make_loop(TinyMethod(), config(tmp_path), name="other")
    with pytest.raises(UserError, match="written by tiny, not other"):
        other.resume()


def test_a_step_of_other_samples_is_refused(tmp_path: Path):
    run(tmp_path, max_steps=1)
    other = make_loop(TinyMethod(), config(tmp_path, batch_size=8))
    with pytest.raises(UserError, match="has 4 samples, not 8"):
        other.resume()


def test_weights_of_another_teacher_are_refused_by_name(tmp_path: Path):
    run(tmp_path, max_steps=1)
    method = TinyMethod()
    method.roles["student"].denoiser.network.outer = torch.nn.Linear(5, 6)
    with pytest.raises(ValueError, match=r"student\.network do not fit"):
        make_loop(method, config(tmp_path)).resume()
