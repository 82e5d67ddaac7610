"""What a method orders between its turns: that a role is pulled towards another one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import TinyMethod, TinyNetwork, make_loop, role

from fewstep.errors import UserError
from fewstep.networks.roles import trained_pairs
from fewstep.training.following import pulls_after_student
from fewstep.training.method import Pull, Turn
from tests.training.loop_runs import config, run, weights

DECAY = 0.97


class Pulled(TinyMethod):
    """Pulls the critic after every turn of the student, and notes the weights around it; the critic has a head."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.roles["critic"].add("head", nn.Linear(2, 2))
        self.around: list[tuple[Tensor, Tensor, Tensor]] = []

    def turns(self, step, batch):
        for turn in super().turns(step, batch):
            yield turn
            if isinstance(turn, Turn) and turn.role == "student":
                critic, student = (self.roles[name] for name in ("critic", "student"))
                before, head = weights(critic), critic.added["head"].weight.clone()
                yield from pulls_after_student(critic, student, DECAY)
                self.around.append((before, weights(student), weights(critic)))
                assert torch.equal(critic.added["head"].weight, head)


def test_the_pulled_role_keeps_so_much_of_itself_and_its_own_modules(tmp_path: Path):
    method = Pulled()
    run(tmp_path, method, max_steps=4, gradient_accumulation_steps=2)
    assert len(method.around) == 2 * 2  # once for each of the two micro-batches, which share one pull
    for before, student, after in method.around:
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, DECAY * before + (1 - DECAY) * student)


def test_a_resumed_run_pulls_as_an_undisturbed_one(tmp_path: Path):
    whole, parts, again = Pulled(), Pulled(), Pulled(seed=1)
    run(tmp_path / "whole", whole, max_steps=4)
    run(tmp_path / "parts", parts, max_steps=3)
    loop = make_loop(again, config(tmp_path / "parts", max_steps=4))
    loop.resume()
    loop.run()
    assert torch.equal(weights(again.roles["critic"]), weights(whole.roles["critic"]))


def test_after_a_fault_that_ends_the_run_nothing_is_pulled(tmp_path: Path):
    method = Pulled(poison=("student", 2))
    with pytest.raises(UserError, match="not finite"):
        run(tmp_path, method, max_steps=6, log_steps=6)
    assert len(method.around) > 2
    (before, _, after), *late = method.around
    assert not torch.equal(before, after)
    assert all(torch.equal(before, after) for before, _, after in late)


def test_a_decay_of_one_orders_nothing():
    roles = TinyMethod().roles
    assert pulls_after_student(roles["critic"], roles["student"], 1.0) == ()
    assert pulls_after_student(roles["critic"], roles["student"], 0.9) == (Pull("critic", "student", 0.9),)


def test_roles_of_other_kinds_are_refused_with_what_to_do():
    roles = TinyMethod().roles
    wider = role("critic", TinyNetwork(6, width=8), TinyMethod().schedule, "flow")
    with pytest.raises(UserError, match=r"the critic cannot be pulled towards the student.*full_critic"):
        trained_pairs(wider, roles["student"])
