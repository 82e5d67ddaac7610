"""DMD2's own class on small real networks, in the real loop: routing, counts, backward simulation, and the GAN."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from toys import (
    TABLE,
    Asked,
    Labels,
    TinyNetwork,
    every_kind_of_teacher,
    make_loop,
    role,
    roles_that_move,
    unconditional,
)

from fewstep.conditioning.conditioning import Conditioning
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.renoising import Renoised
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.errors import UserError
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.heads import make_head
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config

GRID = (1.0, 0.75, 0.5, 0.25)


def config(out: Path, **settings) -> Dmd2Config:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3}
    return Dmd2Config(teacher="tiny", out=str(out), **{**defaults, **settings})


class Noting(Dmd2):
    """DMD2, noting the samples that the student's turn and the critic's turn look at."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[str, Tensor]] = []
        chosen = self.matching

        def matching(x0, batch, called_at):
            self.seen.append(("student", x0.clone()))
            return chosen(x0, batch, called_at)

        self.matching = matching

    def denoising(self, x0, batch):
        self.seen.append(("critic", x0.clone()))
        return super().denoising(x0, batch)


def vector_method(
    settings: Dmd2Config, schedule: NoiseSchedule | None = None, kind: str = "flow", renoise: str = "fresh"
) -> Noting:
    """DMD2 over vectors of 6 with labels; student and critic start as the teacher."""
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    teacher = TinyNetwork(6)
    roles = {}
    for name in ("teacher", "student", "critic"):
        network = TinyNetwork(6)
        network.load_state_dict(teacher.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name != "teacher")
    sampler = Sampler(schedule, GRID, renoise, schedule.initial_scale())
    return Noting(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler)


def batch(step: int, indices: range, logging: bool = False) -> Batch:
    conditions = Labels().batch(0, list(indices))
    return Batch(len(indices), (6,), conditions, Draws(0, step, indices), None, logging)


# --- one step --------------------------------------------------------------------------------------------------------


def test_in_r_steps_the_critic_is_updated_r_times_and_the_student_once(tmp_path: Path):
    method = vector_method(config(tmp_path, max_steps=10, critic_updates=5))
    make_loop(method, method.config).run()
    assert [name for name, _ in method.seen] == ["student", *["critic"] * 5] * 2


def test_the_critic_learns_from_the_sample_that_the_student_was_judged_by(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_updates=2, lr=0.1))
    make_loop(method, method.config).run()
    samples = iter(method.seen)
    for name, x0 in samples:
        if name == "student":  # its update lies between these two
            assert torch.equal(next(samples)[1], x0)


def test_a_graph_of_the_student_is_built_for_its_own_turn_and_its_last_call_only(tmp_path: Path):
    method = vector_method(config(tmp_path, critic_updates=5))
    graphs: list[bool] = []
    method.roles["student"].denoiser.network.register_forward_hook(lambda _m, _a, x0: graphs.append(x0.requires_grad))
    for step in range(10):
        graphs.clear()
        turns = list(method.turns(step, batch(step, range(4))))
        own = step % 5 == 0
        assert [turn.role for turn in turns] == (["student"] if own else []) + ["critic"]
        assert graphs == [False] * (len(graphs) - 1) + [own]


def test_the_students_turn_holds_the_gradient_at_x0_and_nothing_of_teacher_or_critic(tmp_path: Path):
    method = vector_method(config(tmp_path))
    turn = next(method.turns(0, batch(0, range(4))))
    (x0, gradient), *others = turn.backward
    assert (turn.role, others) == ("student", [])
    assert not gradient.requires_grad
    assert gradient.shape == x0.shape
    outside = [p for name in ("teacher", "critic") for p in method.roles[name].denoiser.network.parameters()]
    outside = [p.requires_grad_() for p in outside]
    assert all(g is None for g in torch.autograd.grad(x0, outside, gradient, allow_unused=True))


def test_the_student_makes_as_many_calls_for_every_sample_process_and_micro_batch(tmp_path: Path):
    method = vector_method(config(tmp_path))
    network, calls = method.roles["student"].denoiser.network, []
    network.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for step in range(24):
        by_process = []
        for indices in (range(0, 4), range(4, 8)):
            calls.clear()
            next(method.turns(step, batch(step, indices)))
            by_process.append(len(calls))
        assert by_process[0] == by_process[1]
        counts.append(by_process[0])
    assert set(counts) == {1, 2, 3, 4}


def test_what_is_only_looked_at_costs_calls_only_in_logged_steps(tmp_path: Path):
    method = vector_method(config(tmp_path))
    calls: list[int] = []
    method.roles["teacher"].denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    logs = {}
    for logging in (False, True):
        calls.clear()
        logs[logging] = next(method.turns(1, batch(1, range(4), logging))).log
        assert len(calls) == logging
    assert logs[True].keys() - logs[False].keys() == {"critic/lag"}


@pytest.mark.parametrize("settings", [{}, {"swiftbrush": True}], ids=["dmd2", "swiftbrush"])
def test_the_critic_learns_at_all_times_and_is_compared_with_the_teacher_at_those_that_were_set(
    tmp_path: Path, settings: dict
):
    settings = {"time_min": 0.3, "time_max": 0.7, "critic_updates": 1, **settings}
    method = vector_method(config(tmp_path, **settings))
    asked = Asked(method.roles["critic"], method.roles["teacher"])
    for step in range(8):
        for _ in method.turns(step, batch(step, range(512))):
            pass
    near = partial(pytest.approx, abs=0.01)
    assert asked.span("teacher", trained=False) == asked.span("critic", trained=False) == (near(0.3), near(0.7))
    lowest, highest = asked.span("critic", trained=True)
    assert 1e-3 <= lowest < 0.01 and 0.99 < highest <= 1


def test_the_head_judges_at_all_times_whatever_the_range_and_the_shift_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    method = vector_method(config(tmp_path, time_min=0.3, time_max=0.7, gan_weight=0.1, critic_updates=1, data="x"))
    method.tap = FeatureTap("map")
    judged: list[Tensor] = []

    def logits(seen: Renoised, _of: Batch | Real) -> Tensor:
        judged.append(seen.t)
        return seen.x_t.sum(1)

    monkeypatch.setattr(method, "logits", logits)
    given = batch(0, range(512))
    real = Real(torch.zeros(512, 6), given.conditioning)
    for _ in method.turns(0, replace(given, given_real=real)):
        pass
    assert len(judged) == 3  # the student's sample in its own turn, then a fake and a real one in the critic's
    for times in judged:
        assert 1e-3 <= times.min() < 0.01 and 0.99 < times.max() <= 1


def test_the_lag_is_one_while_the_critic_still_is_the_teacher(tmp_path: Path):
    method = vector_method(config(tmp_path))
    turn = next(method.turns(1, batch(1, range(4), logging=True)))
    assert turn.log["critic/lag"].item() == pytest.approx(1)


@pytest.mark.parametrize("renoise", ["fresh", "ode"])
@every_kind_of_teacher
def test_every_kind_of_teacher_trains_both_roles(tmp_path: Path, schedule: NoiseSchedule, kind: str, renoise: str):
    method = vector_method(config(tmp_path, critic_updates=2), schedule, kind, renoise)
    assert roles_that_move(method) == {"student", "critic"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic_updates": 0}, "critic_updates"),
        ({"gan_weight": 1e-3}, "needs real images"),
        ({"time_min": 0.5, "time_max": 0.4}, "time_min"),
        ({"time_min": 0.0}, "time_min"),
        ({"time_max": 1.5}, "time_max"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


# --- the adversarial term, on a stock UNet ----------------------------------------------------------------------------


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return network


class StockCall:
    """How a UNet2DModel is called."""

    component = "network"

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, timestep).sample


class Pictures:
    """Real samples without conditions."""

    def batch(self, seed: int, positions: list[int]) -> Real:
        x0 = torch.stack([torch.full((1, 8, 8), float(position % 3)) for position in positions])
        return Real(x0, unconditional(len(positions)))


def gan_method(settings: Dmd2Config, checkpointing: bool = False) -> Dmd2:
    schedule, roles = TABLE, {}
    for name in ("teacher", "student", "critic"):
        roles[name] = role(name, tiny_unet(), schedule, "epsilon", trainable=name != "teacher")
        roles[name].denoiser.recipe = StockCall()
        if checkpointing and name != "teacher":
            roles[name].denoiser.network.enable_gradient_checkpointing()
    tap, critic = FeatureTap("mid_block"), roles["critic"]
    with torch.no_grad():
        half = torch.full((1,), 0.5, dtype=torch.float64)
        features = critic.denoiser.features(torch.zeros(1, 1, 8, 8), half, unconditional(1), tap)
    critic.add("head", make_head(features, seed=0))
    sampler = Sampler(schedule, GRID, "fresh")
    return Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, tap)


def gan_run(out: Path, checkpointing: bool = False, **settings) -> tuple[Dmd2, list[tuple[str, dict[str, Tensor]]]]:
    """A short run, and for each update the gradients, by role and parameter, that it was made with."""
    settings = {"gan_weight": 0.1, "gan_critic_weight": 0.1, "data": "pictures", "critic_updates": 2, **settings}
    method = gan_method(config(out, **settings), checkpointing)
    loop = make_loop(method, method.config, (1, 8, 8), conditions=Labels(None), real=Pictures())
    updates = []
    for name, optimizer in loop.optimizers.items():

        def watched(step: int, averages, name=name, update=optimizer.update) -> Tensor:
            found = {}
            for owner, one in method.roles.items():
                for prefix, module in one.modules.items():
                    for key, parameter in module.named_parameters():
                        if parameter.grad is not None:
                            found[f"{owner}.{prefix}.{key}"] = parameter.grad.clone()
            updates.append((name, found))
            return update(step, averages)

        optimizer.update = watched
    loop.run()
    return method, updates


def test_with_a_gan_each_turn_still_reaches_its_own_role_only(tmp_path: Path):
    method, updates = gan_run(tmp_path, max_steps=2)
    assert [name for name, _ in updates] == ["student", "critic", "critic"]
    for name, gradients in updates:
        assert {key.partition(".")[0] for key in gradients} == {name}
    assert any(key.startswith("critic.head.") for key in updates[1][1])
    assert len(updates[1][1]) == len(method.roles["critic"].parameters())


def test_the_head_pulls_at_the_student_through_the_critic(tmp_path: Path):
    _, without = gan_run(tmp_path / "without", max_steps=1, gan_weight=1e-9)
    _, strong = gan_run(tmp_path / "strong", max_steps=1, gan_weight=10.0)
    name = "student.network.conv_out.weight"
    assert not torch.allclose(without[0][1][name], strong[0][1][name], rtol=0.1)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path):
    _, plain = gan_run(tmp_path / "plain", max_steps=2)
    _, checkpointed = gan_run(tmp_path / "checkpointed", checkpointing=True, max_steps=2)
    assert len(plain) == len(checkpointed) == 3
    for (name, ours), (other, theirs) in zip(plain, checkpointed):
        assert name == other
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_critic_and_head_learn_to_tell_real_from_fake(tmp_path: Path):
    gan_run(tmp_path, max_steps=60, gan_critic_weight=1.0, lr=1e-2, critic_updates=1000, batch_size=8)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["critic/adversarial"] for row in rows]
    assert sum(losses[:10]) / 10 == pytest.approx(2 * math.log(2), abs=0.05)  # undecided
    assert sum(losses[-10:]) / 10 < 1.25
