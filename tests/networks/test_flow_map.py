"""Second times of stock networks: where they enter, that they change nothing at first, and derivatives along a flow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY, WAN_CALL, tiny_dit, tiny_wan
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.prediction import add_noise, ode_step, to_velocity
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.networks.adapters import Backbone
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.derivative import derivative_along, refuse_underivable
from fewstep.networks.flow_map import FlowMapDenoiser, flow_direction, gap
from fewstep.networks.roles import Role, follow, make_role, update_average
from fewstep.networks.second_time import add_second_time, attach_second_time
from fewstep.networks.time_embedders import find_time_embedders, likely_time_embedders
from fewstep.recording import Recording, record
from fewstep.recording.shake import shaken

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES: dict[str, NoiseSchedule] = {"flow": FlowSchedule(), "table": TABLE, "edm": EDMSchedule()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", pipeline_folder.names(metafunc.config, sample=True))


@dataclass
class Told:
    """A student of two times beside its teacher, in float64, and a point to ask them at."""

    teacher: Role
    student: Role
    x_t: Tensor
    t: Tensor
    r: Tensor
    conditioning: Conditioning


def told(recording: Recording, dtype: torch.dtype = torch.float64, **settings: Any) -> Told:
    """Roles as a run makes them; a time between two entries of a table, and one that float32 timesteps hold exactly."""
    roles = {
        name: make_role(name, recording, trainable=name == "student", dtype=dtype, **settings)
        for name in ("teacher", "student")
    }
    conditioning = Conditioning(recording.marked, 1).select([0, 0])
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    how = {"gradient_checkpointing": False, "seed": 0, **settings}
    add_second_time(roles, recording.component, x, conditioning, differentiated=True, **how)
    roles["student"].added["second_time"].to(dtype)
    schedule = recording.schedule
    if isinstance(schedule, EDMSchedule):
        t = schedule.time_from_sigma(torch.tensor([0.9, 2.0], dtype=torch.float64))
    else:
        t = schedule.time(torch.tensor([512.5, 300.5], dtype=torch.float64))
    return Told(roles["teacher"], roles["student"], x, t, 0.4 * t, conditioning)


def stir(role: Role) -> None:
    """A second time that does something."""
    generator = torch.Generator().manual_seed(3)
    for head in role.added["second_time"].heads:
        head.weight.data += 0.3 * torch.randn(head.weight.shape, generator=generator)


def differences(student: FlowMapDenoiser, at: Told, velocity: Tensor, step: float) -> Tensor:
    """The derivative along the flow by finite differences, in float64."""
    x_change, t_change = flow_direction(at.x_t, velocity, at.t, student.schedule)
    wide = [-1, *[1] * (at.x_t.dim() - 1)]
    steps = step / t_change  # equal ones in t, which float32 timesteps hold exactly

    def ask(sign: int) -> Tensor:
        x = at.x_t + sign * steps.reshape(wide).to(at.x_t) * x_change
        with torch.no_grad():
            return student.velocity(x, at.t + sign * step, at.conditioning, at.r)

    near = (ask(1) - ask(-1)) / (2 * steps.reshape(wide))
    return near.to(at.x_t)


def same_gradient(one: Tensor, other: Tensor, parameters: list[nn.Parameter]) -> None:
    """Of a pass with a tangent and a plain one, whose attention is the fused kernel's."""
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(3), dtype=one.dtype)
    found, expected = (torch.autograd.grad(u, parameters, weights, allow_unused=True) for u in (one, other))
    size = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * size)


def check(pipeline: Any, call: dict[str, Any], network: nn.Module) -> None:
    with shaken(network):
        recording = record(pipeline, **call)
        at = told(recording)
        student: FlowMapDenoiser = at.student.denoiser
        # Nothing is changed by a second time at first, whatever it is.
        with torch.no_grad():
            theirs = at.teacher.denoiser
            theirs.continuous = student.continuous
            for r in (at.t, at.r, torch.zeros_like(at.t)):
                expected = theirs.raw(at.x_t, at.t, at.conditioning)
                ours = student.raw(at.x_t, at.t, at.conditioning, r)
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)  # sums of another order in memory
            stir(at.student)
            ours = student.raw(at.x_t, at.t, at.conditioning, at.r)
        assert bool((ours != expected).flatten(1).any(1).all())
        velocity = torch.randn(at.x_t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        u, change = student.velocity_and_derivative(at.x_t, at.t, at.conditioning, at.r, velocity)
        assert not change.requires_grad
        same_gradient(u, student.velocity(at.x_t, at.t, at.conditioning, at.r), at.student.parameters())
        # Steps of 2^-6 and 2^-8 on a scale of 1000 timesteps; a kink of Sana's attention may lie within the first.
        unit = 1e-3 if not isinstance(student.schedule, EDMSchedule) else 1e-3 * 2**-2
        off = []
        for step in (2**-6 * unit, 2**-8 * unit):
            expected = differences(student, at, velocity, step).flatten(1)
            off.append((change.flatten(1) - expected).norm(dim=1) / expected.norm(dim=1))
        assert bool((torch.minimum(*off) < 4e-3).all()), off


@pytest.mark.parametrize("family", TINY)
def test_derivatives_are_those_of_finite_differences(family: str):
    builder, call = TINY[family]
    pipeline = builder()
    check(pipeline, call, pipeline_folder.denoiser(pipeline))


def test_derivatives_of_every_family_of_the_folder(zoo_name: str, zoo: Path):
    pipeline = DiffusionPipeline.from_pretrained(zoo / zoo_name)
    check(pipeline, pipeline_folder.call_of(zoo, zoo_name, pipeline), pipeline_folder.denoiser(pipeline))


# --- where it enters --------------------------------------------------------------------------------------------------


def sites_of(pipeline: Any, **call: Any) -> dict[str, int]:
    recording = record(pipeline, **call)
    role = make_role("teacher", recording, trainable=False)
    conditioning = Conditioning(recording.marked, 1).select([0, 0])

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return role.denoiser.raw(x, t, conditioning)

    t = torch.full((2,), 0.5, dtype=torch.float64)
    return find_time_embedders(role.denoiser.network, ask, torch.randn(2, *recording.sample_shape), t)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("dit", {f"transformer_blocks.{k}.norm1.emb.timestep_embedder": 16 for k in range(2)}),
        ("stable_diffusion", {"time_embedding": 32}),
        ("ddim", {"time_embedding": 32}),
        ("flow", {"time_text_embed.timestep_embedder": 16}),
    ],
)
def test_it_enters_where_the_time_alone_is_known(family: str, expected: dict[str, int]):
    builder, call = TINY[family]
    pipeline = builder()
    found = sites_of(pipeline, **call)
    assert found == expected
    likely = likely_time_embedders(pipeline_folder.denoiser(pipeline))
    assert found.items() <= likely.items()  # DiT's last norm is given the embedder of its first block


def test_wan_has_one_place():
    pipeline = tiny_wan()
    pipeline.register_modules(transformer_2=None)
    pipeline.register_to_config(boundary_ratio=None)
    assert sites_of(pipeline, prompt="the cat", **WAN_CALL) == {"condition_embedder.time_embedder": 24}


class Timeless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.body(x) * (1 + timestep.reshape(-1, 1).to(x))


def test_a_network_without_such_a_place_is_refused_in_one_line():
    network = Timeless()
    with pytest.raises(UserError, match="Timeless has no module that makes something of the time alone") as caught:
        find_time_embedders(network, network, torch.randn(2, 6), torch.rand(2, dtype=torch.float64))
    assert "\n" not in str(caught.value)


# --- derivatives that cannot be had -----------------------------------------------------------------------------------


class Rounding(nn.Module):
    """Rounds its time, so that the derivative is zero without any error."""

    def forward(self, t: Tensor) -> Tensor:
        return (1e6 * t).long().double()[:, None]


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.sin()


class Opaque(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return OldFunction.apply(t)[:, None]


@pytest.mark.parametrize(
    ("network", "message"),
    [(Rounding(), "its derivative by the time is lost on the way"), (Opaque(), "has no forward derivative")],
)
def test_a_network_whose_derivative_is_lost_is_refused_in_one_line(network: nn.Module, message: str):
    with pytest.raises(UserError, match=message) as caught:
        refuse_underivable(network, torch.tensor([0.3, 0.6], dtype=torch.float64), network)
    assert "--variant alpha_flow --alpha_min" in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_changes_with_time_at_its_entries_too():
    t = TABLE.snap(torch.tensor([0.3, 0.8], dtype=torch.float64))
    _, rate = TABLE.derivatives(t)
    _, found = derivative_along(lambda t: TABLE.coefficients(t).sigma, (t,), (torch.ones_like(t),), nn.Identity())
    torch.testing.assert_close(found, rate)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_direction_of_the_flow_is_that_of_its_samples(name: str):
    """Along x_t = alpha x0 + sigma noise, whose velocity is noise - x0, per unit of sigma / (alpha + sigma)."""
    schedule = SCHEDULES[name]
    x0, noise = torch.randn(2, 2, 5, dtype=torch.float64).unbind(0)
    t = torch.tensor([0.3125, 0.71], dtype=torch.float64)
    t = t + 0.00025 if name == "table" else t
    x_change, t_change = flow_direction(add_noise(x0, noise, schedule.coefficients(t)), noise - x0, t, schedule)
    h = 1e-6
    after, before = t + h, t - h
    span = schedule.flow_time(after) - schedule.flow_time(before)
    torch.testing.assert_close(t_change, 2 * h / span, rtol=1e-5, atol=0)
    moved = add_noise(x0, noise, schedule.coefficients(after)) - add_noise(x0, noise, schedule.coefficients(before))
    torch.testing.assert_close(x_change, moved / span[:, None], rtol=1e-5, atol=1e-8)


# --- average velocities with a closed form ----------------------------------------------------------------------------


class Gaussian(nn.Module):
    """The exact average velocity of data of standard deviation s, in any prediction type that is asked for."""

    S = 0.7
    gap: Tensor

    def __init__(self, schedule: NoiseSchedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.nothing = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_in: Tensor, t: Tensor) -> Tensor:
        from fewstep.diffusion.prediction import expand, velocity_map

        x_t = x_in / expand(self.schedule.input_scale(t), x_in)
        alpha, sigma = self.schedule.coefficients(t)
        tau = sigma / (alpha + sigma)
        rho = tau - self.gap
        # On the flow of a Gaussian, samples keep their quantiles: y_rho = y_tau S(rho) / S(tau).
        spread = ((1 - tau) ** 2 * self.S**2 + tau**2).sqrt()
        ratio = ((1 - rho) ** 2 * self.S**2 + rho**2).sqrt() / spread
        own = (tau - (1 - tau) * self.S**2) / spread**2
        apart = self.gap > 1e-9
        u = torch.where(apart, (1 - ratio) / torch.where(apart, self.gap, 1.0), own)
        velocity = expand(u / (alpha + sigma), x_t) * x_t + 0 * self.nothing
        skip, out = velocity_map(self.kind, self.schedule, t)
        return (velocity - expand(skip, x_t) * x_t) * expand(1 / out, x_t)


class Told2(nn.Module):
    from contextlib import contextmanager

    @contextmanager
    def on(self, network: Gaussian, gap: Any) -> Any:
        network.gap = gap()
        yield


class TimestepRecipe:
    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, self.schedule.time(timestep))


def gaussian(schedule: NoiseSchedule, kind: str) -> FlowMapDenoiser:
    base = NetworkDenoiser(Gaussian(schedule, kind), TimestepRecipe(schedule), schedule, kind)
    return FlowMapDenoiser(base, Told2())


KINDS = [("flow", "flow"), ("table", "epsilon"), ("table", "v_prediction"), ("table", "sample"), ("edm", "edm")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_mean_flow_identity_holds_on_a_gaussian(name: str, kind: str):
    """u = v - (t - r) du/dt along v, at every two times, in every schedule and prediction type."""
    schedule = SCHEDULES[name]
    student = gaussian(schedule, kind)
    tau, rho = torch.tensor([[0.9, 0.7, 0.5], [0.1, 0.4, 0.3]], dtype=torch.float64)
    t, r = (schedule.time_from_flow_time(value) for value in (tau, rho))
    nothing = Conditioning({}, 3)
    x_t = torch.randn(3, 4, dtype=torch.float64)
    velocity = student.velocity(x_t, t, nothing, t).detach()
    _, change = student.velocity_and_derivative(x_t, t, nothing, r, velocity)
    u = student.velocity(x_t, t, nothing, r)
    torch.testing.assert_close(u, velocity - gap(schedule, t, r)[:, None] * change, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_any_number_of_steps_lead_to_the_same_sample(name: str, kind: str):
    schedule = SCHEDULES[name]
    student = gaussian(schedule, kind)
    top = torch.full((2,), 0.9, dtype=torch.float64)
    ends = []
    for times in ((0.9,), (0.9, 0.5), (0.9, 0.6, 0.4, 0.2)):
        x = torch.tensor([[1.0, -2.0], [0.3, 0.7]], dtype=torch.float64)
        for tau, rho in zip(times, (*times[1:], 0.0), strict=True):
            t = schedule.time_from_flow_time(torch.full_like(top, tau))
            r = schedule.time_from_flow_time(torch.full_like(top, rho)) if rho else torch.zeros_like(top)
            x0 = student(x, t, Conditioning({}, 2), r)
            x = ode_step(x, x0, schedule.coefficients(t), schedule.coefficients(r)) if rho else x0
        ends.append(x)
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_a_second_time_behind_the_first_is_refused():
    t = torch.tensor([0.3], dtype=torch.float64)
    with pytest.raises(ValueError, match="the second time r is at most t"):
        gaussian(FlowSchedule(), "flow").raw(torch.zeros(1, 2), t, Conditioning({}, 1), t + 0.1)


def test_a_flow_networks_velocity_is_its_answer():
    t = torch.tensor([0.1, 0.77], dtype=torch.float64)
    raw = torch.randn(2, 5)
    assert torch.equal(to_velocity(raw, "flow", torch.randn(2, 5), FlowSchedule(), t), raw)


# --- roles ------------------------------------------------------------------------------------------------------------


def loss_gradients(at: Told) -> list[Tensor]:
    """Of a pass with one second time while another pass, with another, was made before the backward."""
    parameters = at.student.parameters()
    loss = at.student.denoiser.velocity(at.x_t, at.t, at.conditioning, at.r).square().mean()
    with torch.no_grad():
        at.student.denoiser.velocity(at.x_t, at.t, at.conditioning, at.t)
    return list(torch.autograd.grad(loss, parameters))


def test_checkpointed_blocks_are_told_the_time_of_their_own_pass():
    """DiT makes something of its time in every block, and every block runs again in the backward pass."""
    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        recording = record(pipeline, class_labels=[1])
        found = []
        for checkpointing in (False, True):
            at = told(recording, gradient_checkpointing=checkpointing)
            stir(at.student)
            found.append(loss_gradients(at))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-12)


def test_checkpointed_adapters_are_told_the_time_of_their_own_pass():
    from toys import adapter_role

    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        recording = record(pipeline, class_labels=[1])
        sites = sites_of(pipeline, class_labels=[1])
        conditioning = Conditioning(recording.marked, 1).select([0, 0])
        x, t = torch.randn(2, *recording.sample_shape), torch.tensor([0.5, 0.7], dtype=torch.float64)
        found = []
        for checkpointing in (False, True):
            backbone = Backbone(recording.network, 2, 2.0, gradient_checkpointing=checkpointing)
            student = adapter_role("student", backbone, recording)
            teacher = adapter_role("teacher", backbone, recording)
            attach_second_time(student, recording.component, sites, checkpointing, 0)
            stir(student)
            loss = student.denoiser.velocity(x, t, conditioning, 0.3 * t).square().mean()
            with torch.no_grad():
                teacher(x, t, conditioning)
            found.append(torch.autograd.grad(loss, student.parameters()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)


def test_an_average_holds_the_second_time_too():
    pipeline = tiny_dit()
    recording = record(pipeline, class_labels=[1])
    sites = sites_of(pipeline, class_labels=[1])
    roles = {name: make_role(name, recording, trainable=name == "student") for name in ("student", "ema")}
    for name, role in roles.items():
        attach_second_time(role, recording.component, sites, False, seed=len(name))
    assert not roles["ema"].parameters()
    follow(roles)
    ours, theirs = (role.added["second_time"].state_dict() for role in (roles["ema"], roles["student"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    stir(roles["student"])
    update_average(roles["ema"], roles["student"], 0.75)
    head = roles["student"].added["second_time"].heads[0].weight
    torch.testing.assert_close(roles["ema"].added["second_time"].heads[0].weight, 0.25 * head)
