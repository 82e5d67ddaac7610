"""PG-SB: what its drawn guidance changes in SwiftBrush's turns, where it is SwiftBrush, and where it arrives."""

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_ddim
from torch import Tensor
from toys import Labels, TinyNetwork, labels, make_loop, role

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.distillation import distill
from fewstep.programs.planning.call_counts import CallCounter, Calls
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from fewstep.trainers.snoopi import Snoopi, SnoopiConfig
from tests.trainers.test_dmd2 import GRID, TABLE

SCHEDULES = {"table": (TABLE, "epsilon"), "flow": (FlowSchedule(), "flow"), "edm": (EDMSchedule(), "edm")}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
QUIET = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3}


def config(out: Path, **settings) -> SnoopiConfig:
    return SnoopiConfig(teacher="tiny", out=str(out), **{**QUIET, **settings})


def method(settings: Dmd2Config, schedule: str = "flow", scale: float = 3.0, same: bool = False) -> Dmd2:
    """Over vectors of 6, with a critic that is another network than the teacher, or the ``same``."""
    chosen, kind = SCHEDULES[schedule]
    roles = {}
    for seed, name in enumerate(("teacher", "student", "critic")):
        torch.manual_seed(0 if same else seed)
        roles[name] = role(name, TinyNetwork(6), chosen, kind, trainable=name != "teacher")
    guided = GuidedDenoiser(roles["teacher"], scale)
    made = Snoopi if isinstance(settings, SnoopiConfig) else Dmd2
    return made(settings, roles, guided, Sampler(chosen, GRID, "ode", chosen.initial_scale()))


def batch(step: int, indices: range = range(4)) -> Batch:
    return Batch(
        len(indices), (6,), Labels(null=0.0).batch(0, list(indices)), Draws(0, step, indices), None, logging=False
    )


def noise_of(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t - alpha * x0) / sigma


@every_schedule
def test_teacher_and_critic_are_guided_by_one_scale_of_each_sample(tmp_path: Path, schedule: str):
    one = method(config(tmp_path), schedule)
    x0 = torch.randn(4, 6)
    gradient, _ = one.matching(x0, batch(0), 1.0)
    given = batch(0)
    x_t, t, _ = one.compared(x0, given.draws, "matching")
    kappa = (0.5 + 3.5 * given.draws.uniform("guidance_scale")).float()[:, None]
    alpha, sigma = (c.float().reshape(-1, 1) for c in one.compared.schedule.coefficients(t))
    noises = []
    for name in ("teacher", "critic"):
        both = [one.roles[name](x_t, t, condition) for condition in (labels([0.0] * 4), given.conditioning)]
        negative, positive = (noise_of(x0, x_t, alpha, sigma) for x0 in both)
        noises.append(negative + kappa * (positive - negative))
    expected = sigma**2 * (noises[0] - noises[1]) / x0.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@every_schedule
def test_a_range_of_one_scale_is_swiftbrush(tmp_path: Path, schedule: str):
    random = method(config(tmp_path, guidance_min=3.0, guidance_max=3.0), schedule)
    plain = method(Dmd2Config(teacher="tiny", out=str(tmp_path), swiftbrush=True, **QUIET), schedule, scale=3.0)
    x0 = torch.randn(4, 6)
    ours, theirs = (one.matching(x0, batch(0), 1.0)[0] for one in (random, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    for drawn, fixed in zip(
        random.turns(1, batch(1)), plain.turns(5, batch(1)), strict=True
    ):  # the critic's is the same
        if drawn.role == fixed.role == "critic":
            torch.testing.assert_close(drawn.backward[0][0], fixed.backward[0][0])
            return
    pytest.fail("no turn of the critic was compared")


def test_a_critic_that_knows_as_much_as_the_teacher_leaves_the_student_alone_at_any_scale(tmp_path: Path):
    one = method(config(tmp_path), same=True)
    assert one.matching(torch.randn(4, 6), batch(0), 1.0)[0].abs().max() < 1e-6


def test_scales_fill_their_range_and_belong_to_the_sample(tmp_path: Path):
    one = method(config(tmp_path, guidance_min=1.0, guidance_max=5.0))
    whole = one.drawn_guidance(batch(3, range(1000)))
    assert 1 <= whole.min() < 1.05 and 4.95 < whole.max() < 5
    assert whole.mean().item() == pytest.approx(3, abs=0.15)
    assert torch.equal(one.drawn_guidance(batch(3, range(500, 1000))), whole[500:])  # another process, or micro-batch
    assert not torch.equal(one.drawn_guidance(batch(4, range(1000))), whole)


@every_schedule
def test_each_turn_reaches_its_own_role(tmp_path: Path, schedule: str):
    one = method(config(tmp_path), schedule)
    for step in range(2):
        names = []
        for turn in one.turns(step, batch(step)):
            names.append(turn.role)
            torch.autograd.backward(*zip(*turn.backward, strict=True))
            reached = {
                name for name, player in one.roles.items() if any(p.grad is not None for p in player.parameters())
            }
            assert reached == {turn.role}
            for player in one.roles.values():
                for parameter in player.parameters():
                    parameter.grad = None
        assert names == ["student", "critic"]  # one update of each in every step


def test_a_run_trains_both_roles_at_the_declared_cost(tmp_path: Path):
    one = method(config(tmp_path, critic_updates=2, log_steps=100))
    before = {name: player.state_dict()["network.outer.weight"].clone() for name, player in one.roles.items()}
    with CallCounter(one) as counter:
        make_loop(one, one.config).run()
    after = {name: player.state_dict()["network.outer.weight"] for name, player in one.roles.items()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"student", "critic"}
    for step in set(counter.steps) - counter.logged:
        assert counter.calls(step) == declared(one, step, batch(step))
    assert declared(one, 0, batch(0))["teacher"] == Calls(no_grad=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_min": 4.0, "guidance_max": 0.5}, "--guidance_min and --guidance_max must be a range"),
        ({"guidance_max": None}, "must be a range"),
        ({"guidance_scale": 3.0}, "is drawn from --guidance_min to --guidance_max"),
        ({"swiftbrush": False}, "snoopi is SwiftBrush under a random guidance"),
        ({"decoupled": "hybrid"}, "give one of them"),
        ({"gan_weight": 0.1, "data": "x"}, "--swiftbrush knows no --gan_weight"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_a_teacher_without_guidance_is_refused(tmp_path: Path):
    settings = {"steps": 1, "out": str(tmp_path / "run"), "cpu": True, "report_to": "none"}
    with pytest.raises(UserError, match="needs a teacher with classifier-free guidance"):
        distill(tiny_ddim(), "snoopi", **settings)
