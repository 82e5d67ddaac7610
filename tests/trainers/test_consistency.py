"""Consistency's own class on small real networks: who learns, the boundary, the scheduler's function, closed forms."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor, nn
from toys import Labels, TinyNetwork, labels, make_loop, role, unconditional

from fewstep.data.batch import Batch, Real
from fewstep.diffusion.discretization import EvenTimes, SigmaRange
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, from_scheduler
from fewstep.errors import UserError
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.consistency import Consistency, ConsistencyConfig
from tests.floors import declared

GRID = (1.0, 0.75, 0.5, 0.25)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE, _ = from_scheduler(LCMScheduler(**SD))
FAMILIES = [(TABLE, "epsilon"), (TABLE, "v_prediction"), (FlowSchedule(), "flow"), (EDMSchedule(), "edm")]
every_family = pytest.mark.parametrize(("schedule", "kind"), FAMILIES, ids=["epsilon", "v", "flow", "edm"])
every_variant = pytest.mark.parametrize("variant", ["lcm", "cd", "ct", "ict", "ect"])


def config(out: Path, variant: str = "lcm", **settings) -> ConsistencyConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "steps": 4}
    if variant in ("ct", "ict", "ect"):
        defaults["data"] = "numbers"
    return ConsistencyConfig(teacher="tiny", out=str(out), variant=variant, **{**defaults, **settings})


def vector_method(
    settings: ConsistencyConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    guidance_scale: float = 1.0,
    timestep_scaling: float | None = None,
) -> Consistency:
    """Consistency over vectors of 6 with labels; the student starts as the teacher."""
    settings = settings.resolved()
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = TinyNetwork(6), {}
    names = ["teacher", "student", *(["target"] if settings.target_decay != 0 else [])]
    for name in [*names, *(["ema"] if settings.ema_decay else [])]:
        network = TinyNetwork(6)
        network.load_state_dict(first.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name == "student")
    levels = SigmaRange(schedule)
    return Consistency(
        settings,
        roles,
        GuidedDenoiser(roles["teacher"], labels([5.0]), guidance_scale),
        Sampler(schedule, GRID, "fresh", schedule.initial_scale()),
        settings.make_discretization(levels, 1.0, list(GRID)),
        settings.make_boundary(levels, timestep_scaling),
    )


class Numbers:
    """Real samples of 6 numbers."""

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        x0 = torch.stack([torch.linspace(-1, 1, 6) * (position % 3) for position in positions])
        return Real(x0, labels([float(position % 3 - 1) for position in positions]))


def batch(step: int, indices: range, real: bool) -> Batch:
    rows = list(indices)
    found = Numbers().batch(0, rows) if real else None
    return Batch(len(rows), (6,), Labels().batch(0, rows), Draws(0, step, rows), found, False)


def run(method: Consistency) -> Consistency:
    make_loop(method, method.config, real=Numbers() if method.config.data else None).run()
    return method


def weights(method: Consistency, name: str) -> Tensor:
    return torch.cat([value.flatten() for value in method.roles[name].state_dict().values()])


# --- who learns, and what it costs ------------------------------------------------------------------------------------


@every_variant
@every_family
def test_only_the_student_learns_and_its_target_follows(
    tmp_path: Path, schedule: NoiseSchedule, kind: str, variant: str
):
    method = vector_method(config(tmp_path, variant), schedule, kind)
    before = {name: weights(method, name) for name in method.roles}
    run(method)
    moved = {name for name in before if not torch.equal(before[name], weights(method, name))}
    assert moved == {"student", "target"} & set(method.roles)
    assert ("target" in method.roles) == (variant in ("lcm", "cd", "ct"))
    assert all(torch.isfinite(weights(method, name)).all() for name in method.roles)


@every_variant
def test_no_gradient_reaches_target_or_teacher(tmp_path: Path, variant: str):
    method = vector_method(config(tmp_path, variant))
    turn = next(method.turns(0, batch(0, range(4), real=True)))
    ((loss, gradient),) = turn.backward
    assert (turn.role, gradient, loss.dim()) == ("student", None, 0)
    outside = [p for name, one in method.roles.items() if name != "student" for p in one.weights.parameters()]
    outside = [p.requires_grad_() for p in outside]
    assert all(g is None for g in torch.autograd.grad(loss, outside, allow_unused=True, retain_graph=True))
    assert all(g is not None for g in torch.autograd.grad(loss, method.student.parameters(), allow_unused=True))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("solver", ["none", "euler", "heun"])
@pytest.mark.parametrize("target_decay", [0.0, 0.9])
def test_a_step_costs_what_the_method_says(tmp_path: Path, solver: str, target_decay: float, drawn: bool, real: bool):
    if solver == "none" and (drawn or not real):
        return  # no teacher, or nothing to learn from
    settings = {"solver": solver, "target_decay": target_decay, "data": "numbers" if real else None}
    settings |= {"guidance_min": 2.0, "guidance_max": 4.0} if drawn else {}
    method = vector_method(config(tmp_path, **settings), guidance_scale=3.0)
    counted: dict[str, list[int]] = {}
    for name, one in method.roles.items():
        one.denoiser.network.register_forward_hook(
            lambda _m, inputs, output, name=name: counted.setdefault(name, [0, 0]).__setitem__(
                output.requires_grad, counted[name][output.requires_grad] + len(inputs[0])
            )
        )
    for step in range(6):
        counted.clear()
        list(method.turns(step, batch(step, range(4), real)))
        said = declared(method, step, batch(step, range(4), real))
        assert {name: [4 * cost.no_grad, 4 * cost.to_parameters] for name, cost in said.items()} == counted


@pytest.mark.parametrize("variant", ["lcm", "ict"])
def test_micro_batches_and_resumes_change_nothing(tmp_path: Path, variant: str):
    common = {"max_steps": 5, "ema_decay": 0.9, "checkpointing_steps": 2}
    whole = run(vector_method(config(tmp_path / "whole", variant, batch_size=8, **common)))
    split = run(
        vector_method(config(tmp_path / "split", variant, batch_size=2, gradient_accumulation_steps=4, **common))
    )
    run(vector_method(config(tmp_path / "parts", variant, batch_size=8, **common)))
    shutil.rmtree(max((tmp_path / "parts" / "checkpoints").iterdir()))  # as if it had been killed before the last one
    resumed = vector_method(config(tmp_path / "parts", variant, batch_size=8, **common))
    loop = make_loop(resumed, resumed.config, real=Numbers() if resumed.config.data else None)
    loop.resume()
    assert 0 < loop.step < 5
    loop.run()
    for name in whole.roles:
        torch.testing.assert_close(weights(split, name), weights(whole, name), rtol=1e-4, atol=1e-6)
        assert torch.equal(weights(resumed, name), weights(whole, name))


# --- f ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timestep_scaling", [None, 10.0])
@every_family
def test_f_at_the_boundary_is_the_sample_itself(
    tmp_path: Path, schedule: NoiseSchedule, kind: str, timestep_scaling: float | None
):
    if timestep_scaling and schedule is not TABLE:
        return  # the scalings of a table's scheduler
    method = vector_method(config(tmp_path), schedule, kind, timestep_scaling=timestep_scaling)
    x, t = torch.randn(3, 6), torch.full((3,), SigmaRange(schedule).lowest, dtype=torch.float64)
    assert torch.equal(method.function(method.student)(x, t, labels([0, 1, 2])), x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scaling", [10.0, 1.0])
def test_what_the_lcm_scheduler_makes_of_the_networks_answer_is_f_at_every_trained_time(
    tmp_path: Path, kind: str, scaling: float
):
    method = vector_method(config(tmp_path), TABLE, kind, timestep_scaling=scaling)
    stock = LCMScheduler(**SD, prediction_type=kind, timestep_scaling=scaling)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    x = torch.randn(1, 6, dtype=torch.float64)
    for t in method.discretization.times(0):
        timestep = TABLE.timestep(t).round().long()
        stock.set_timesteps(timesteps=[int(timestep)])
        raw = method.student.denoiser.raw(x, t[None], labels([1.0]))
        ours = method.function(method.student)(x, t[None], labels([1.0]))
        torch.testing.assert_close(
            stock.step(raw, timestep, x).denoised, ours, rtol=1e-6, atol=1e-6
        )  # float32 scalings


def test_what_the_stock_schedulers_of_flow_and_edm_make_of_the_networks_answer_is_f(tmp_path: Path):
    x = torch.randn(1, 6)
    flow = vector_method(config(tmp_path))
    for t in flow.discretization.times(0)[1:]:
        stock = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        stock.set_timesteps(sigmas=[float(t)])
        raw = flow.student.denoiser.raw(x, t[None], labels([1.0]))
        ours = flow.function(flow.student)(x, t[None], labels([1.0]))
        theirs = stock.step(raw, stock.timesteps[0], x).prev_sample
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    schedule = EDMSchedule()
    edm = vector_method(config(tmp_path), schedule, "edm")
    stock = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    for t in edm.discretization.times(0)[1:]:
        sigma = schedule.coefficients(t).sigma
        raw = edm.student.denoiser.raw(x, t[None], labels([1.0]))
        ours = edm.function(edm.student)(x, t[None], labels([1.0]))
        torch.testing.assert_close(stock.precondition_outputs(x, raw, sigma.float()), ours, rtol=1e-5, atol=1e-6)


# --- closed forms -----------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """The exact x0 under flow matching of data of standard deviation S."""

    S = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))  # whose dtype a denoiser asks for

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        t = (timestep / 1000).reshape(-1, 1).to(x.dtype)
        return self.S**2 * (1 - t) / ((1 - t) ** 2 * self.S**2 + t**2) * x


class Gains(nn.Module):
    """A student that multiplies x_t with a number of its own at each time of a grid."""

    def __init__(self, times: Tensor, gains: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", times)
        self.gains = nn.Parameter(gains.clone())

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        place = (timestep.reshape(-1, 1) / 1000 - self.times).abs().argmin(1)
        return self.gains[place].reshape(-1, 1).to(x.dtype) * x


def closed_form(times: Tensor) -> Tensor:
    """What f multiplies x_t with at each grid time when it is consistent along the teacher's Euler steps."""
    gains = [torch.ones((), dtype=torch.float64)]
    for r, t in pairwise(times):
        x0 = Gaussian.S**2 * (1 - t) / ((1 - t) ** 2 * Gaussian.S**2 + t**2)
        gains.append(gains[-1] * ((1 - r) * x0 + r * (1 - (1 - t) * x0) / t))
    return torch.stack(gains)


def gaussian_method(settings: ConsistencyConfig, start: Tensor | None = None) -> Consistency:
    settings, schedule = settings.resolved(), FlowSchedule()
    discretization = EvenTimes(SigmaRange(schedule), [settings.intervals + 1])
    times = discretization.times(0)
    roles = {"teacher": role("teacher", Gaussian(), schedule, "sample", trainable=False)}
    for name in ("student", "target"):
        network = Gains(times, torch.ones_like(times) if start is None else start)
        roles[name] = role(name, network, schedule, "sample", trainable=name == "student")
    teacher = GuidedDenoiser(roles["teacher"], None, 1.0)
    boundary = settings.make_boundary(discretization.levels, None)
    return Consistency(settings, roles, teacher, Sampler(schedule, GRID, "fresh"), discretization, boundary)


def test_the_flow_lcm_of_a_gaussian_teacher_has_its_closed_form_as_a_fixed_point(tmp_path: Path):
    settings = config(tmp_path, intervals=50, distance="mse")
    times = gaussian_method(settings).discretization.times(0)
    method = gaussian_method(settings, closed_form(times))
    x0, noise = torch.randn(2, 50, 6, dtype=torch.float64)
    pair = method.discretization.neighbours(times, torch.arange(50))
    seen = method.compare(x0, noise, pair, unconditional(50))
    torch.testing.assert_close(seen.f, seen.target, rtol=1e-10, atol=1e-10)
    gradient = torch.autograd.grad(method.distance(seen).mean(), method.student.parameters())[0]
    assert gradient.abs().max() < 1e-10
    # Fifty Euler steps come close to the flow's own map, x_t S / S(t), which at t = 1 is S.
    assert closed_form(times)[-1].item() == pytest.approx(Gaussian.S, rel=0.04)


def test_the_flow_lcm_of_a_gaussian_teacher_comes_to_its_closed_form(tmp_path: Path):
    settings = config(tmp_path, intervals=6, distance="mse", lr=0.03, max_steps=250, batch_size=32, data="numbers")
    method = gaussian_method(settings)
    expected = closed_form(method.discretization.times(0))
    assert (method.student.denoiser.network.gains - expected).abs().max() > 0.4

    class Real16:
        def batch(self, seed: int, positions: Sequence[int]) -> Real:
            return Real(Gaussian.S * Draws(9, 0, positions).normal("x", (16,)), unconditional(len(positions)))

    make_loop(method, settings, (16,), conditions=Labels(None), real=Real16()).run()
    gains = method.student.denoiser.network.gains[1:]  # at the boundary f is x whatever the network says
    torch.testing.assert_close(gains.detach(), expected[1:], rtol=0, atol=0.02)


def test_a_clean_neighbour_is_where_the_trajectory_ends(tmp_path: Path):
    """With the same noise that is the real sample; with the teacher's step, what the teacher says."""
    for solver in ("none", "euler"):
        method = vector_method(config(tmp_path, "ect", solver=solver))
        pair = method.discretization.neighbours(torch.zeros(4), stage=0)
        assert (pair.sigma_r == 0).all()
        x0, noise = torch.randn(2, 4, 6)
        seen = method.compare(x0, noise, pair, labels([0, 1, 2, 3]))
        assert torch.equal(seen.target, seen.x_r)
        assert torch.equal(seen.target, x0) == (solver == "none")


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "tcm"}, "--variant must be one of lcm, cd, ct, ict, ect"),
        ({"variant": "ict", "data": None}, "--variant ict trains on real images.*give --data"),
        ({"variant": "ect", "data": None}, "give --data"),
        ({"solver": "none"}, "give --data"),
        ({"solver": "rk4"}, "--solver"),
        ({"distance": "lpips"}, "--distance"),
        ({"weighting": "snr"}, "--weighting"),
        ({"huber_c": -1.0}, "huber_c"),
        ({"target_decay": 1.0}, "target_decay"),
        ({"intervals": 0}, "intervals"),
        ({"variant": "ict", "first_levels": 100, "last_levels": 10}, "first_levels"),
        ({"variant": "ect", "ect_q": 1.0}, "ect_q"),
        ({"renoise": "ode"}, "--renoise ode does not sample a consistency model in several steps"),
        ({"guidance_min": 2.0}, "must be a range"),
        ({"guidance_min": 4.0, "guidance_max": 2.0}, "must be a range"),
        ({"guidance_embedding": True}, "--guidance_embedding needs the range"),
        ({"variant": "ict", "guidance_min": 2.0, "guidance_max": 4.0}, "no teacher is asked"),
        (
            {"guidance_min": 2.0, "guidance_max": 4.0, "guidance_embedding": True, "guidance_scale": 7.5},
            "choose it from 2 to 4",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)


def test_several_steps_take_fresh_noise_and_one_what_ships(tmp_path: Path):
    assert config(tmp_path, steps=4).resolved().renoise == "fresh"
    assert config(tmp_path, steps=1).resolved().renoise == "auto"
    assert config(tmp_path, steps=1, renoise="ode").resolved().renoise == "ode"


def test_a_lora_has_no_slow_copy_unless_asked(tmp_path: Path):
    assert config(tmp_path, lora_rank=4).resolved().target_decay == 0
    assert config(tmp_path, lora_rank=4, target_decay=0.9).resolved().target_decay == 0.9
    later = replace(config(tmp_path), lora_rank=64)  # as a plan's advice asks
    assert (later.target_decay, later.resolved().target_decay) == (None, 0)
