"""FreeFlow's own class: the exact map of a Gaussian, what reaches whom, its mixture, and that it reads no data."""

import builtins
from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, energy_distance, mixture_sample
from PIL import Image
from tiny_pipelines import tiny_dit
from toys import Labels, TinyNetwork, labels, make_loop, role, unconditional

from fewstep.conditioning.conditioning import Conditioning
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.flow_map import FlowMapDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.programs.distillation import distill
from fewstep.trainers.free_flow import FreeFlow, FreeFlowConfig
from tests.networks.second_times import SCHEDULES
from tests.networks.test_flow_map_gaussian import Gaussian, TimestepRecipe, Told2
from tests.trainers.test_mean_flow import Telling
from tests.trainers.test_mean_flow_mixture import SCHEDULE, TwoTimes
from tests.trainers.test_mean_flow_mixture import Telling as TellingGap


def config(**settings) -> FreeFlowConfig:
    return FreeFlowConfig(teacher="tiny", out="out", **settings)


def vectors(settings: FreeFlowConfig, kind: str = "flow", guidance_scale: float = 1.0) -> FreeFlow:
    """Over vectors of 6 with labels."""
    schedule, network = SCHEDULES[kind], {"flow": "flow", "table": "epsilon", "edm": "edm"}[kind]
    torch.manual_seed(0)
    names = {"teacher": False, "student": True, "critic": True}
    roles = {name: role(name, TinyNetwork(6), schedule, network, on) for name, on in names.items()}
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Telling())
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    return FreeFlow(settings, roles, guided, Sampler(schedule, (1.0,), "ode", schedule.initial_scale()))


def batch(count: int = 8, step: int = 0) -> Batch:
    told = labels([float(k) for k in range(count)], 0.0)
    return Batch(count, (6,), told, Draws(0, step, range(count)), None, False)


class Named(TimestepRecipe):
    component = "network"


@pytest.mark.parametrize("derivative", ["exact", "difference"])
@pytest.mark.parametrize("kind", [("flow", "flow"), ("table", "v_prediction"), ("edm", "edm")], ids=lambda of: of[0])
def test_the_exact_map_of_a_gaussian_has_no_residual(derivative: str, kind: tuple[str, str]):
    """u + delta du/ddelta = v(x_r, r), for steps of every length from noise, in every schedule."""
    schedule = SCHEDULES[kind[0]]
    recipe, student, teacher = Named(schedule), Gaussian(schedule, kind[1]), Gaussian(schedule, kind[1])
    teacher.gap = torch.zeros((), dtype=torch.float64)
    roles = {
        name: NetworkRole(name, NetworkDenoiser(net, recipe, schedule, kind[1]))
        for name, net in (("teacher", teacher), ("student", student))
    }
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Told2())
    how = config(correction=0.0, derivative=derivative, **({} if derivative == "exact" else {"derivative_step": 1e-4}))
    start = 0.93 if kind[0] == "table" else 1.0
    trained = FreeFlow(how, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), Sampler(schedule, (start,), "ode"))
    count = 16
    t = torch.full((count,), start, dtype=torch.float64)
    tau = schedule.flow_time(t) * torch.linspace(0.01, 0.99, count, dtype=torch.float64)
    r = schedule.time_from_flow_time(tau)
    x = torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, target = trained.prediction(x, t, Conditioning({}, count), r)
    torch.testing.assert_close(u, target, rtol=2e-4, atol=2e-4 * float(u.abs().max()))
    assert u.requires_grad and not target.requires_grad


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_student_moves_by_both_losses_and_then_the_critic(kind: str):
    trained = vectors(config(), kind)
    turns = []
    for turn in trained.turns(0, batch()):
        turns.append((turn.role, [gradient is None for _, gradient in turn.backward]))
        inputs = trained.roles[turn.role].parameters()
        pieces = [(t, torch.ones_like(t) if g is None else g.to(t.dtype)) for t, g in turn.backward]
        found = torch.autograd.grad([t for t, _ in pieces], inputs, [g for _, g in pieces], allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in found)
        others = [p for name, one in trained.roles.items() for p in one.parameters() if name != turn.role]
        assert all(p.grad is None for p in others)
    assert turns == [("student", [True, False]), ("critic", [True])]
    assert [turn.role for turn in vectors(config(correction=0.0)).turns(0, batch())] == ["student"]


def test_the_correction_is_weighed_like_the_prediction_and_guided_below_its_time_alone(monkeypatch):
    trained = vectors(config(correction_t_max=0.5), guidance_scale=3.0)
    asked, ask = [], GuidedDenoiser.__call__

    def noted(self, x, t, told, end=None, *, guidance_scale=None):
        if guidance_scale is not None:
            asked.append((t, guidance_scale.flatten()))
        return ask(self, x, t, told, end, guidance_scale=guidance_scale)

    monkeypatch.setattr(GuidedDenoiser, "__call__", noted)
    turn = next(trained.turns(0, batch(32)))
    ((t, scale),) = [one for one in asked if one[1].numel() == 8 and len(set(one[1].tolist())) == 2]
    assert torch.equal(scale == 3.0, t <= 0.5)
    (loss, _), (_, gradient) = turn.backward
    # The loss is the batch's: the predicted three quarters count as many samples as they are.
    assert float(loss.detach()) == pytest.approx(24 / 32 * float(turn.log["student/prediction"]), rel=1e-5)
    assert float(gradient.flatten(1).norm(dim=1).mean()) * 32 == pytest.approx(float(_signal(trained)), rel=1e-4)
    assert loss.dim() == 0


def test_the_correction_is_a_difference_of_velocities_of_a_strength_of_its_own():
    trained, x0 = vectors(config()), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    direction, _ = trained.correction(x0, batch())
    here, told = trained.compared(x0, batch().draws, "matching"), batch().conditioning
    said = (trained.roles[name](here.x_t, here.t, told) for name in ("teacher", "critic"))
    of_teacher, of_critic = ((here.x_t - one) / here.t[:, None] for one in said)
    torch.testing.assert_close(direction, (of_teacher - of_critic).detach(), check_dtype=False)
    one, other = (vectors(config(correction_scale=scale)).turns(0, batch()) for scale in (1.0, 2.5))
    torch.testing.assert_close(next(other).backward[1][1], 2.5 * next(one).backward[1][1])


def _signal(trained: FreeFlow) -> torch.Tensor:
    """The mean norm of the prediction's gradient by u, of its own rows."""
    given = batch(32)
    x, r = given.draws.normal("noise", (6,))[:24], trained.ends(given.draws)[:24]
    t = torch.ones(24, dtype=torch.float64)
    u, target = trained.prediction(x, t, given.conditioning.select(list(range(24))), r)
    error = (u - target).detach()
    return (2 / 6 * error.norm(dim=1) / (error.square().mean(1) + 1e-3)).mean()


def test_what_is_corrected_is_the_end_of_the_batch_and_the_critic_learns_it_at_all_times():
    trained, given, seen = vectors(config(match_min=0.1, match_max=0.6)), batch(), []
    correction = trained.correction

    def noted(x0: torch.Tensor, rest: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((x0, rest))
        return correction(x0, rest)

    trained.correction = noted
    list(trained.turns(0, given))
    ((x0, rest),) = seen
    assert list(rest.draws.indices) == [6, 7]
    noise, one = batch().draws.normal("noise", (6,))[6:], torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(x0, trained.student(noise, one, labels([6.0, 7.0]), 0 * one).detach())
    assert trained.compared.ends == (0.1, 0.6) and trained.learnt.ends == (1e-3, 1.0)


def test_a_steps_change_is_a_difference_to_a_longer_step_or_at_the_end_to_a_shorter_one():
    trained, asked = vectors(config(time_min=0.1, derivative_step=0.02)), []
    r = torch.tensor([0.1, 0.119, 0.121, 0.5], dtype=torch.float64)
    x, told = torch.zeros(4, 6), labels([0.0] * 4)

    class Squares:
        """u = r^2 of an end r: du/ddelta is -2 r."""

        def velocity(self, x: torch.Tensor, _t: object, _told: object, end: torch.Tensor) -> torch.Tensor:
            asked.append(end)
            return (end**2)[:, None].expand_as(x)

    trained.student = Squares()
    u = (r**2)[:, None].expand(4, 6)
    found = trained.change(x, torch.ones(4, dtype=torch.float64), told, r, u)
    torch.testing.assert_close(asked[0], torch.tensor([0.12, 0.139, 0.101, 0.48], dtype=torch.float64))
    torch.testing.assert_close(found, -(asked[0] + r)[:, None].expand(4, 6))


def test_the_ends_of_steps_lie_between_the_lowest_time_and_the_noise_of_the_first_step():
    for kind, schedule in SCHEDULES.items():
        trained = vectors(config(time_min=0.3, time_mean=-0.4, time_std=2.0), kind)
        top = schedule.flow_time(torch.ones(1, dtype=torch.float64)).item()
        tau = schedule.flow_time(trained.ends(Draws(0, 0, range(500))))
        drawn = (2 * Draws(0, 0, range(500)).normal("r", ()).double() - 0.4).sigmoid()
        assert float(drawn.min()) < 0.1
        torch.testing.assert_close(tau, drawn.clamp(0.3, top), rtol=0, atol=1e-2 if kind == "table" else 1e-9)
        low = vectors(config(time_min=1e-6), kind)
        cleanest = schedule.flow_time(torch.zeros(1, dtype=torch.float64)).item()
        assert (low.lowest, low.highest) == pytest.approx((max(1e-6, cleanest), top))


def test_parts_of_a_batch_keep_their_draws():
    whole, part = batch(8), batch(8).select([5, 7])
    assert torch.equal(part.draws.normal("x", (6,)), whole.draws.normal("x", (6,))[[5, 7]])
    assert part.size == 2 and part.conditioning.arguments()["label"].tolist() == [5, 7]
    assert [config(correction=share).parts(8)[1] for share in (0.0, 0.01, 0.25, 0.99)] == [0, 1, 2, 7]
    assert config().parts(4) == (3, 1) and config().parts(1) == (1, 1)
    assert [turn.role for turn in vectors(config()).turns(0, batch(1))] == ["student", "critic"]


def test_no_image_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Noise, labels and a teacher are all that a run reads; its pictures it only writes."""
    opened = builtins.open

    def watched(file, mode="r", *args, **kwargs):
        pictured = str(file).lower().endswith((".png", ".jpg", ".jpeg", ".webp"))
        assert not (pictured and "r" in mode and "+" not in mode), f"{file} was opened"
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    run = {"classes": "0-9", "max_steps": 2, "batch_size": 4, "sample_steps": 0, "report_to": "none", "cpu": True}
    folder = distill(tiny_dit(), "free_flow", out=str(tmp_path / "run"), ema_decay=0.5, **run)
    assert (folder / "second_time" / "config.json").is_file()
    assert not (tmp_path / "run" / "pairs").exists()


def test_one_step_comes_nearer_to_the_mixture(tmp_path: Path):
    """To the mixture's samples, two sets of which are 0.003 apart; the teacher's step is 1.5 away."""
    torch.manual_seed(0)
    networks = {"teacher": MixtureTeacher(), "critic": MixtureTeacher()}
    networks |= {name: TwoTimes(from_teacher=True) for name in ("student", "ema")}
    kinds = {"teacher": "sample", "critic": "sample", "student": "flow", "ema": "flow"}
    trainable = ("student", "critic")
    roles = {name: role(name, net, SCHEDULE, kinds[name], name in trainable) for name, net in networks.items()}
    roles["ema"].copy_weights(roles["student"])
    for name in ("student", "ema"):
        roles[name].denoiser = FlowMapDenoiser(roles[name].denoiser, TellingGap())
    quiet = {"report_to": "none", "sample_steps": 0, "log_steps": 1000, "checkpointing_steps": 9000, "batch_size": 64}
    times = {"time_mean": 0.5, "time_std": 1.6, "ema_decay": 0.97, "weight_power": 0.5}
    told = FreeFlowConfig(teacher="mixture", out=str(tmp_path), lr=3e-3, max_steps=220, **quiet, **times)
    trained = FreeFlow(told, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), Sampler(SCHEDULE, (1.0,), "ode"))
    make_loop(trained, told, (2,), conditions=Labels(None)).run()
    noise = Draws(1, 0, range(2000)).normal("noise", (2,))
    with torch.no_grad():
        samples = rollout(roles["ema"], trained.sampler, noise, unconditional(2000))
    found = energy_distance(samples, mixture_sample(2000, 1))
    assert found < 0.6, found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "images"}, "FreeFlow learns from noise alone: leave out --data"),
        ({"steps": 4}, "--steps 1, not 4"),
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"critic_updates": 5}, "leave out --critic_updates"),
        ({"correction": 1.0}, r"--correction must be in \[0, 1\)"),
        ({"correction_t_max": 700.0}, r"--correction_t_max is a flow time in \[0, 1\]"),
        ({"match_min": 0.9, "match_max": 0.1}, "0 < min < max <= 1"),
        ({"derivative": "guess"}, "--derivative must be one of difference, exact"),
        ({"derivative_step": 0.0}, "--derivative_step must be between 0 and 0.1"),
        ({"time_min": 0.0}, "--time_min must be between 0 and 0.5"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)
