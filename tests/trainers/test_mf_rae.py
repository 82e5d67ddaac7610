"""MF-RAE's own class: its stages, what each learns of a Gaussian, its walks, and refusals."""

import pytest
import torch
from torch import Tensor
from toys import TinyNetwork, labels, role

from fewstep.conditioning.conditioning import Conditioning
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.diffusion.trajectories import trajectories
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.mf_rae import MfRae, MfRaeConfig
from tests.networks.second_times import SCHEDULES
from tests.networks.test_flow_map_gaussian import KINDS, Gaussian, TimestepRecipe, Told2, gaussian
from tests.trainers.test_mean_flow import Telling

FLOW = FlowSchedule()


def config(**settings) -> MfRaeConfig:
    return MfRaeConfig(teacher="tiny", out="out", **settings)


def vectors(settings: MfRaeConfig, guidance_scale: float = 1.0) -> MfRae:
    """Over vectors of 6 with labels."""
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), FLOW, "flow", name == "student") for name in ("teacher", "student")}
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Telling())
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    return MfRae(settings, roles, guided, Sampler(FLOW, (1.0, 0.5), "ode"), 6)


def batch(count: int = 8, step: int = 0) -> Batch:
    draws, x0 = Draws(0, step, range(count)), torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    told = labels([float(k) for k in range(count)], 0.0)
    return Batch(count, (6,), told, draws, Real(x0, told), False, Pairs(x0, x0, told))


# --- the stages -------------------------------------------------------------------------------------------------------


def test_every_step_belongs_to_its_stage_and_each_begins_anew():
    told = config(stages="cmt:2, mfd:3, mft", data="images", max_steps=9)
    assert told.starts() == {"cmt": 0, "mfd": 2, "mft": 5}
    assert [told.stage_at(step)[0] for step in range(9)] == ["cmt"] * 2 + ["mfd"] * 3 + ["mft"] * 4
    assert config(max_steps=1000).starts() == {"cmt": 0, "mfd": 200} and config(max_steps=3).starts() == {"mfd": 0}
    assert config().follows_max_steps and not config(stages="mfd").follows_max_steps
    assert config(stages="cmt:3,mfd:7", max_steps=10).starts() == {"cmt": 0, "mfd": 3}
    trained = vectors(config(stages="cmt:1,mfd:1,mft", data="images", max_steps=3, tangent_warmup=4))
    logs = [next(trained.turns(step, batch(step=step))).log for step in range(3)]
    assert ["student/trajectory" in log for log in logs] == [True, False, False]
    velocities = [flow.config.velocity for flow in trained.flows.values()]
    assert velocities == ["teacher", "data"]
    seen: list[int] = []
    trained.flow("mft", 6).turns = lambda step, _batch: seen.append(step) or iter(())
    list(trained.turns(2, batch()))
    shifts = [trained.flow("mfd", entries).config.time_shift for entries in (6, 16384)]
    assert shifts == [1, 2], "each size of samples has its own"
    assert seen == [0]


def test_pairs_are_wanted_by_distillation_without_images_alone():
    assert config().pairs_wanted is not None
    assert config(stages="cmt").pairs_wanted is None
    assert config(data="images").pairs_wanted is None
    assert config(stages="cmt:1,mfd", derivative="exact").differentiates
    assert not config(stages="cmt", derivative="exact").differentiates and not config().differentiates


def test_times_are_shifted_by_the_size_of_a_sample():
    assert config().of_stage("mfd", 768 * 16 * 16).time_shift == pytest.approx(6.928, abs=1e-3)
    assert config().of_stage("mfd", 1024).time_shift == 1
    assert config(time_shift=3.0).of_stage("mfd", 1024).time_shift == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "mfd:5,cmt"}, "--stages: cmt comes before mfd or twice; their order is cmt, mfd, mft"),
        ({"stages": "cmt:5,cmt"}, "--stages: cmt comes before cmt or twice"),
        ({"stages": "cmt:0,mfd"}, "--stages: cmt needs its number of steps, at least 1"),
        ({"stages": "cmt,mfd"}, "--stages: cmt needs its number of steps"),
        ({"stages": "cmt:1000,mfd"}, "mfd begins at step 1000 and lasts until --max_steps 1000"),
        ({"stages": "cmt:5,mfd:5"}, "give more steps, and the last stage without a number"),
        ({"stages": "cmt:5,xyz"}, "--stages takes such as .* not 'xyz'"),
        ({"stages": ""}, "--stages takes such as"),
        ({"stages": "mfd:500,mft"}, "stage mft learns from real images: give --data"),
        ({"kappa": 0.5, "data": "images"}, "are the guidance of stage mft"),
        ({"velocity": "teacher"}, "leave out --velocity"),
        ({"velocity": "data"}, "leave out --velocity"),
        ({"variant": "alpha_flow"}, "--variant alpha_flow belongs to mean_flow"),
        ({"variant": "fp16"}, "--variant fp16 belongs to mean_flow; .*files of the teacher: --teacher_variant"),
        ({"walk_steps": 0}, "--walk_steps must be at least 1"),
        ({"pairs_per_walk": 0}, "--pairs_per_walk must be at least 1"),
        ({"label_times": "even"}, "--label_times must be one of solver_times, uniform_grid"),
        ({"walk_solver": "rk4"}, "--walk_solver must be one of"),
        ({"cmt_distance": "lpips"}, "--cmt_distance must be one of mse, l1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)


# --- walks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_between_two_states_of_an_exact_walk_lies_the_exact_average_velocity(name: str, kind: str):
    """Of a Gaussian, in every schedule; the walk's own error falls with its steps."""
    schedule, student = SCHEDULES[name], gaussian(SCHEDULES[name], kind)
    teacher = gaussian(schedule, kind)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (20, 80):
        times = [schedule.time_from_flow_time(torch.tensor([k / steps * 0.9])).item() for k in range(steps, 0, -1)]
        walks = trajectories(OdeSolver(teacher, schedule, "heun", line="flow"), x, times, Conditioning({}, 3))
        pair = torch.arange(walks.pairs)
        chord = walks.chords(pair, pair % 3)
        assert bool((chord.r < chord.t).all()) and int((chord.r == 0).sum()) == steps
        u = student.velocity(chord.x_t, chord.t, Conditioning({}, len(pair)), chord.r).detach()
        errors.append(float((u - chord.velocity).abs().mean() / u.abs().mean()))
    assert errors[1] < errors[0] / 3 and errors[1] < 3e-3


def test_even_labels_miss_the_states_of_a_shifted_walk():
    walk = OdeSolver(gaussian(FLOW, "flow"), FLOW)
    x, nothing = torch.randn(1, 4, dtype=torch.float64), Conditioning({}, 1)
    own, even = (trajectories(walk, x, [1.0, 0.8, 0.5], nothing, how) for how in ("solver_times", "uniform_grid"))
    first = torch.zeros(1, dtype=torch.long)
    assert own.chords(first, first).t.item() == 0.5 and even.chords(first, first).t.item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="labels is one of solver_times, uniform_grid"):
        trajectories(walk, x, [1.0], nothing, "none")


def test_samples_that_share_a_walk_share_its_condition_and_its_noise():
    trained = vectors(config(stages="cmt", pairs_per_walk=3, walk_steps=4))
    asked: list[tuple[Tensor, Tensor]] = []
    raw = trained.roles["teacher"].denoiser.raw
    trained.roles["teacher"].denoiser.raw = lambda x, t, c, *rest: (
        asked.append((x, c.arguments()["label"])) or raw(x, t, c, *rest)
    )
    seen: list[Tensor] = []
    told = trained.student.velocity
    trained.student.velocity = lambda x, t, c, r: seen.append(c.arguments()["label"]) or told(x, t, c, r)
    (turn,) = trained.turns(0, batch(8))
    assert [len(x) for x, _ in asked] == [3] * 4
    assert all(label.tolist() == [0, 3, 6] for _, label in asked)
    torch.testing.assert_close(asked[0][0], batch(8).draws.normal("noise", (6,))[[0, 3, 6]])
    assert seen[0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6]
    (piece,) = turn.backward
    theirs = list(trained.roles["teacher"].parameters()) or list(trained.roles["teacher"].denoiser.network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in theirs) and piece[1] is None
    assert piece[0].requires_grad


@pytest.mark.parametrize("schedule", [FLOW, EDMSchedule()], ids=["flow", "edm"])
def test_each_chord_is_of_its_own_samples_walk_which_begins_where_the_sampler_does(schedule: NoiseSchedule):
    """A teacher that says 0 everywhere walks on straight lines through 0: a state is its noise, times sigma."""
    trained = vectors(config(stages="cmt", pairs_per_walk=2, walk_steps=4))
    trained.sampler = Sampler(schedule, (1.0, 0.5), "ode")
    trained.solver = OdeSolver(lambda x_t, t, conditioning, end=None: torch.zeros_like(x_t), schedule)
    given, first_of = batch(8), [0, 0, 2, 2, 4, 4, 6, 6]
    chord = trained.chords(given, first_of)
    _, sigma = schedule.coefficients(chord.t)
    top = schedule.coefficients(torch.ones(1).double()).sigma / schedule.initial_scale()
    noise = batch(8).draws.normal("noise", (6,))[first_of]
    torch.testing.assert_close(chord.x_t, (sigma / top)[:, None].float() * noise, rtol=1e-4, atol=1e-5)


def test_walks_take_the_teachers_shift_and_states_are_told_the_times_that_are_asked():
    """3 t / (1 + 2 t) of even times; a uniform grid tells these instead."""
    plain = vectors(config(stages="cmt", walk_steps=4, label_times="uniform_grid", pairs_per_walk=1))
    shifted = MfRae(plain.config, plain.roles, plain.teacher, plain.sampler, 6, shift=3.0)
    assert list(shifted.times) == pytest.approx([1, 0.9, 0.75, 0.5])
    given = batch(32)
    chord = shifted.chords(given, list(range(32)))
    assert {round(float(t), 6) for t in chord.t} == {0.25, 0.5, 0.75, 1.0}
    told = MfRae(
        config(stages="cmt", walk_steps=4, pairs_per_walk=1), plain.roles, plain.teacher, plain.sampler, 6, shift=3.0
    )
    assert {round(float(t), 6) for t in told.chords(batch(32), list(range(32))).t} == {0.5, 0.75, 0.9, 1.0}


def test_only_stages_of_mean_flow_ask_their_samples_unevenly():
    assert not vectors(config(stages="cmt")).uneven
    assert vectors(config(stages="cmt:1,mfd", max_steps=4, apart=0.5)).uneven
    assert not vectors(config(stages="cmt:1,mfd", max_steps=4, apart=1.0)).uneven


# --- what the stages reach --------------------------------------------------------------------------------------------


class Named(TimestepRecipe):
    component = "network"


class Off(Gaussian):
    """The exact average velocity, times 1 + a number to be learnt away."""

    def forward(self, x_in: Tensor, t: Tensor) -> Tensor:
        return (1 + self.nothing) * super().forward(x_in, t)


@pytest.mark.parametrize(("stage", "weighting"), [("cmt", "uniform"), ("mfd", "sum_squared"), ("mft", "uniform")])
def test_each_stage_reaches_the_closed_form_on_a_gaussian(stage: str, weighting: str):
    """From 30 % beside it; mft sees one point of data at a time, so that its end jitters."""
    exact = Gaussian(FLOW, "flow")
    exact.gap = torch.zeros((), dtype=torch.float64)
    off = Off(FLOW, "flow")
    off.nothing.data += 0.3
    roles = {"teacher": NetworkRole("teacher", NetworkDenoiser(exact, Named(FLOW), FLOW, "flow"))}
    roles["student"] = NetworkRole("student", NetworkDenoiser(off, Named(FLOW), FLOW, "flow"))
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Told2())
    walks = {"walk_solver": "heun", "walk_steps": 8} if stage == "cmt" else {}
    how = config(stages=stage, data="images", apart=0.75, weighting=weighting, **walks)
    trained = MfRae(how, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), Sampler(FLOW, (1.0,), "ode"), 4)
    optimizer = torch.optim.Adam([off.nothing], lr=2e-2)
    values = []
    for step in range(80):
        draws, count = Draws(0, step, range(32)), 32
        x0 = Gaussian.S * torch.randn(count, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        nothing = Conditioning({}, count)
        (turn,) = trained.turns(step, Batch(count, (4,), nothing, draws, Real(x0, nothing), False))
        optimizer.zero_grad()
        turn.backward[0][0].backward()
        optimizer.step()
        values.append(float(off.nothing.detach()))
    assert abs(sum(values[-20:]) / 20) < {"cmt": 0.02, "mfd": 0.02, "mft": 0.05}[stage], values[-1]
    assert exact.nothing.grad is None


def test_the_identity_holds_for_the_differences_of_the_exact_map():
    """u = v - (t - r) du/dt with the central difference of the method: 0 beside its step's error."""
    student = gaussian(FLOW, "flow")
    trained = vectors(config(stages="mfd"))
    difference = trained.flow("mfd", 4).difference
    t, r = torch.tensor([[0.9, 0.6], [0.2, 0.1]], dtype=torch.float64)
    x, nothing = torch.randn(2, 4, dtype=torch.float64), Conditioning({}, 2)
    v, u = (student.velocity(x, t, nothing, end).detach() for end in (t, r))
    change = difference(student.velocity, FLOW, x, t, nothing, r, v, u)
    torch.testing.assert_close(u, v - gap(FLOW, t, r)[:, None] * change, rtol=1e-3, atol=1e-4)
