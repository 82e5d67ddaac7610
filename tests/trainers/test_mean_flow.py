"""MeanFlow's own class: times, velocities, targets, costs, and refusals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from toys import TinyNetwork, labels, role

from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.programs.planning.call_counts import CallCounter, forward_passes
from fewstep.trainers.mean_flow import MeanFlow, MeanFlowConfig

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"flow": FlowSchedule(), "epsilon": TABLE, "edm": EDMSchedule()}
GRID = (1.0, 0.5)


def config(**settings) -> MeanFlowConfig:
    return MeanFlowConfig(teacher="tiny", out="out", **settings)


class Telling(nn.Module):
    """Adds the gap, times a number, to what the network sees of the label."""

    def end(self, _time: object, following: object) -> object:
        return following

    @contextmanager
    def on(self, network: nn.Module, gap: Callable[[], Tensor]) -> Iterator[None]:
        handle = network.register_forward_pre_hook(
            lambda _module, arguments, named: (arguments, {**named, "label": named["label"] + gap().float()}),
            with_kwargs=True,
        )
        try:
            yield
        finally:
            handle.remove()


def method(kind: str = "flow", settings: MeanFlowConfig | None = None, guidance_scale: float = 1.0) -> MeanFlow:
    """Over vectors of 6 with labels."""
    schedule = SCHEDULES[kind]
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in ("teacher", "student")}
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Telling())
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    return MeanFlow(settings or config(), roles, guided, Sampler(schedule, GRID, "ode", schedule.initial_scale()))


def batch(count: int = 8, step: int = 0) -> Batch:
    draws, x0 = Draws(0, step, range(count)), torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    told = labels([1.0] * count, 0.0)
    return Batch(count, (6,), told, draws, Real(x0, told), False, Pairs(x0, x0, told))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_where_both_times_are_one_it_is_flow_matching(kind: str):
    trained = method(kind, config(data="images", weighting="uniform", apart=1e-9))
    (turn,) = trained.turns(0, batch())
    ((loss, gradient),) = turn.backward
    flow = trained.flow(batch(), [])
    u = trained.student.velocity(flow.x_t, flow.t, flow.conditioning, flow.t)
    given = batch()
    expected = (u - (given.draws.normal("noise", (6,)) - given.real.x0)).square().sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert gradient is None


def test_the_teachers_velocity_is_guided_in_diffusers_convention():
    trained = method("flow", guidance_scale=3.0)
    flow = trained.flow(batch(), [])
    teacher = trained.roles["teacher"].denoiser
    positive, negative = (teacher.raw(flow.x_t, flow.t, labels([label] * 8)) for label in (1.0, 0.0))
    torch.testing.assert_close(flow.velocity, negative + 3 * (positive - negative))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, (3.0, 0.0)),
        ({"kappa": 0.5}, (1.5, 0.5)),
        ({"omega": 0.2, "kappa": 0.92}, (0.2, 0.92)),
        ({"variant": "improved"}, (1.0, 2 / 3)),
    ],
)
def test_guidance_in_training_is_mixed_as_its_papers_say(settings: dict, numbers: tuple[float, float]):
    """omega v + kappa u_c + (1 - omega - kappa) u_null; samples without condition, or beyond the interval, have v."""
    trained = method(
        "flow", config(data="images", guidance_t_min=0.2, guidance_t_max=0.6, label_drop=0.4, **settings), 3.0
    )
    assert (trained.guide.omega, trained.guide.kappa) == pytest.approx(numbers)
    flow, given = trained.flow(batch(64), []), batch(64)
    data = given.draws.normal("noise", (6,)) - given.real.x0
    dropped = torch.tensor(given.draws.coins("label_drop", 0.4))
    assert torch.equal(flow.conditioning.arguments()["label"], 1.0 - dropped.float())
    u_c, u_null = (trained.student.velocity(flow.x_t, flow.t, labels([label] * 64), flow.t) for label in (1.0, 0.0))
    guided = numbers[0] * data + numbers[1] * u_c + (1 - sum(numbers)) * u_null
    on = (~dropped & (flow.t >= 0.2) & (flow.t <= 0.6))[:, None]
    assert bool((flow.t < 0.2).any()) and 5 < int(on.sum()) < 60
    torch.testing.assert_close(flow.velocity, torch.where(on, guided, data).detach())


def test_guidance_in_training_has_an_interval_of_flow_times():
    """Of a table these are sigma / (alpha + sigma), which its own times are not."""
    trained = method("epsilon", config(data="x", guidance_t_min=0.2, guidance_t_max=0.6, label_drop=0.0), 3.0)
    flow = trained.flow(batch(64), [])
    alpha, sigma = TABLE.coefficients(flow.t)
    inside, by_its_own = ((time >= 0.2) & (time <= 0.6) for time in (sigma / (alpha + sigma), flow.t))
    assert torch.equal((flow.velocity != flow.line).any(1), inside) and not torch.equal(inside, by_its_own)


def test_the_fixed_point_of_guidance_in_training_is_the_guided_flow():
    omega, kappa = config(data="x", kappa=0.6).self_guidance(2.5)
    v, u_null = 1.7, 0.4
    u = v
    for _ in range(200):
        u = omega * v + kappa * u + (1 - omega - kappa) * u_null
    assert u == pytest.approx(u_null + 2.5 * (v - u_null))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_target_over_an_interval_is_the_mean_flow_identity(kind: str):
    trained = method(kind)
    flow = trained.flow(batch(), list(range(8)))
    asked = trained.interval(0, flow)
    expected = flow.velocity - gap(trained.schedule, flow.t, flow.r).float()[:, None] * asked.change
    assert asked.weight == 1
    torch.testing.assert_close(asked.target, expected, rtol=1e-5, atol=1e-5)
    assert not asked.target.requires_grad and asked.u.requires_grad
    warmed = method(kind, config(tangent_warmup=100)).interval(0, flow)
    torch.testing.assert_close(warmed.target, flow.velocity)


def test_an_improved_models_derivative_is_along_what_it_says_of_the_flow_itself():
    flow = method().flow(batch(), list(range(8)))
    trained = method("flow", config(variant="improved"))
    at = flow.x_t, flow.t, flow.conditioning
    _, expected = trained.student.velocity_and_derivative(*at, flow.r, trained.student.velocity(*at, flow.t).detach())
    torch.testing.assert_close(trained.interval(0, flow).change, expected)


@pytest.mark.parametrize("derivative", ["central", "renoise", "backward"])
def test_a_difference_stands_for_the_derivative(derivative: str):
    """Along the flow's velocity, or (renoise) along the line of the sample; of the student, without a gradient."""
    flow = method().flow(batch(), list(range(8)))
    trained = method("flow", config(derivative=derivative, derivative_step=1e-3))
    asked = trained.interval(0, flow)
    along = flow.line if derivative == "renoise" else flow.velocity
    at = flow.x_t, flow.t, flow.conditioning, flow.r
    _, exact = trained.student.velocity_and_derivative(*at, along)
    torch.testing.assert_close(asked.change, exact, rtol=0.02, atol=0.02)
    expected = flow.velocity - (flow.t - flow.r).float()[:, None] * asked.change
    torch.testing.assert_close(asked.target, expected, rtol=1e-5, atol=1e-5)
    assert not asked.target.requires_grad and asked.u.requires_grad
    given = batch()
    torch.testing.assert_close(flow.line, given.draws.normal("noise", (6,)) - given.pairs.x0)


def test_a_difference_is_asked_up_to_where_the_student_starts_and_at_entries_of_a_table():
    assert method("flow", config(derivative="central")).difference.high == 1
    trained = method("epsilon", config(derivative="central"))
    assert trained.difference.high == pytest.approx(float(TABLE.flow_time(torch.ones(1))))
    assert not trained.config.differentiates and not trained.one_pass
    with pytest.raises(UserError, match="--derivative renoise takes steps"):
        method("epsilon", config(derivative="renoise"))


def test_uniform_times_are_those_of_mf_rae():
    trained = method("flow", config(times="uniform", time_max=0.9, time_shift=2.0))
    t, r = trained.times.draw(batch(64).draws, range(64))
    given = batch(64)
    first, second = (0.9 * given.draws.uniform(name) for name in "tr")
    expected = torch.stack([2 * q / (1 + q) for q in (first, second)])
    torch.testing.assert_close(t, expected.amax(0))
    torch.testing.assert_close(r, expected.amin(0), rtol=0, atol=1e-3)


def test_a_log_has_the_same_names_whether_times_differ_or_not():
    """Processes add theirs up, and each has coins of its own."""
    logs = [next(method("flow", config(apart=apart)).turns(0, batch())).log for apart in (1e-9, 1.0)]
    assert list(logs[0]) == list(logs[1])


def test_an_alpha_that_falls_until_the_last_step_holds_on_to_it():
    alpha = config(variant="alpha_flow")
    assert alpha.follows_max_steps and not config().follows_max_steps
    assert not config(variant="alpha_flow", alpha_last_step=500).follows_max_steps


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_pass_teaches_what_two_do(kind: str):
    gradients = []
    for settings in ({}, {"gradient_checkpointing": True}, {"sharding": "full"}):
        trained = method(kind, config(apart=0.8, **settings))
        assert trained.one_pass == (not settings)
        (turn,) = trained.turns(0, batch(16))
        gradients.append(torch.autograd.grad(turn.backward[0][0], list(trained.roles["student"].parameters())))
    for one, *others in zip(*gradients, strict=True):
        for two in others:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_alpha_flow_asks_the_student_further_along_the_flow():
    trained = method("epsilon", config(variant="alpha_flow", max_steps=100))
    assert [trained.config.alpha(step) for step in (0, 50, 99)] == [1.0, 0.5, 0.0] and trained.config.differentiates
    kept = config(variant="alpha_flow", max_steps=100, alpha_min=0.1)
    assert [kept.alpha(step) for step in (0, 50, 99)] == [1.0, 0.5, 0.1] and not kept.differentiates
    flow = trained.flow(batch(), list(range(8)))
    asked = trained.interval(50, flow)
    distance = 0.5 * gap(trained.schedule, flow.t, flow.r)
    later = trained.student.later_velocity(flow.x_t, flow.t, flow.conditioning, flow.r, flow.velocity, distance)
    torch.testing.assert_close(asked.target, 0.5 * flow.velocity + 0.5 * later)
    assert asked.weight == 0.5 and not asked.target.requires_grad
    assert torch.equal(trained.interval(0, flow).target, flow.velocity)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_further_along_the_flow_lies_the_same_sample_with_less_of_the_same_noise(kind: str):
    trained, given = method(kind), batch()
    schedule, student, told = trained.schedule, trained.student, given.conditioning
    x0, noise = given.real.x0, given.draws.normal("noise", (6,))
    t, r = trained.times.draw(given.draws, range(8))
    distance = 0.5 * gap(schedule, t, r)
    s = schedule.time_from_flow_time(schedule.flow_time(t) - distance)
    x_t, x_s = (add_noise(x0, noise, schedule.coefficients(time)) for time in (t, s))
    later = student.later_velocity(x_t, t, told, r, noise - x0, distance)
    torch.testing.assert_close(later, student.velocity(x_s, s, told, r), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    ("settings", "scale", "passes"),
    [
        # F 1, backward 2; from data the one without condition; a tangent (1) where the times differ.
        ({"data": "images"}, 3.0, 1 + 2 + 1),
        ({"data": "images", "kappa": 0.5}, 3.0, 1 + 2 + 2),
        ({"data": "images"}, 1.0, 1 + 2),
        ({}, 3.0, 1 + 2 + 2),
    ],
)
def test_a_step_costs_what_it_declares_and_derivatives_only_where_the_times_differ(
    settings: dict, scale: float, passes: int, one_pass: bool
):
    """4.25 forward passes from data where a quarter of the times differs; 4.5 where blocks run again backwards."""
    trained = method("flow", config(apart=0.25, gradient_checkpointing=not one_pass, **settings), scale)
    counter, shares = CallCounter(trained), []
    with counter:
        for step in range(40):
            for turn in trained.turns(step, batch(step=step)):
                torch.autograd.backward(*zip(*turn.backward, strict=True), inputs=trained.roles["student"].parameters())
    for step in range(40):
        found = counter.calls(step)
        assert declared(trained, step, batch(step=step)) == found
        assert counter.wasted(step) == {}
        student = found["student"]
        assert (student.jvp if one_pass else student.jvp_to_parameters) == 0
        shares.append(student.jvp + student.jvp_to_parameters)
        assert forward_passes(found) == pytest.approx(passes + (1 if one_pass else 2) * shares[-1])
    assert sum(shares) / 40 == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "sideways"}, "--variant must be one of mean_flow, alpha_flow, improved"),
        ({"weighting": "cube"}, "--weighting must be one of"),
        ({"velocity": "data"}, "--velocity data is that of real images: give --data"),
        ({"kappa": 0.5}, "a teacher has --guidance_scale"),
        ({"data": "x", "kappa": 1.0}, r"--kappa must be in \[0, 1\)"),
        ({"data": "x", "pairs": "y"}, "give --data or --pairs, not both"),
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"apart": 0.0}, r"--apart must be in \(0, 1\]"),
        ({"time_std": 0.0}, "--time_std must be positive"),
        ({"guidance_t_min": 0.8, "guidance_t_max": 0.2}, "must be a range"),
        ({"variant": "alpha_flow", "alpha_first_step": 5, "alpha_last_step": 5}, "must lie behind"),
        ({"variant": "alpha_flow", "alpha_min": 1.5}, r"--alpha_min must be in \[0, 1\]"),
        ({"label_drop": 1.0}, r"--label_drop must be in \[0, 1\)"),
        ({"derivative": "guess"}, "--derivative must be one of exact, central, renoise, backward"),
        ({"derivative_step": 0.0}, "--derivative_step must be positive"),
        ({"derivative_step": 0.5}, "--derivative_step is a part of the time"),
        ({"derivative": "renoise", "variant": "improved"}, "each say along what"),
        ({"times": "sometimes"}, "--times must be one of logit_normal, uniform"),
        ({"times": "uniform", "r_mean": 1.0}, "leave out --r_mean: it belongs to logit-normal times"),
        ({"time_max": 1.5}, "--time_max must be above --time_min and at most 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)
