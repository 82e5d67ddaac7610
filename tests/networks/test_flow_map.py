"""Derivatives of networks of two times along a flow: as finite differences have them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY
from torch import Tensor, nn

from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.schedule import EDMSchedule
from fewstep.errors import UserError
from fewstep.kernels import dispatch
from fewstep.networks.derivable import described
from fewstep.networks.derivative import derivative_along, refuse_underivable
from fewstep.networks.flow_map import FlowMapDenoiser, flow_direction
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from tests.networks.second_times import SCHEDULES, TABLE, Told, stir, told


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", pipeline_folder.names(metafunc.config, sample=True))


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


def by_every_path(at: Told, velocity: Tensor, expected: Tensor) -> None:
    """Its derivative is the same whatever its processors are told, and leaves them so."""
    student: FlowMapDenoiser = at.student.denoiser
    found = [
        m.processor for m in student.network.modules() if hasattr(getattr(m, "processor", None), "_attention_backend")
    ]
    for backend in ("flex", "_native_flash") if found else ():
        for processor in found:
            processor._attention_backend = backend
        _, change = student.velocity_and_derivative(at.x_t, at.t, at.conditioning, at.r, velocity)
        assert {processor._attention_backend for processor in found} == {backend}
        torch.testing.assert_close(change, expected)
    for processor in found:
        processor._attention_backend = None


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
        by_every_path(at, velocity, change)
        same_gradient(u, student.velocity(at.x_t, at.t, at.conditioning, at.r), at.student.parameters())
        # Steps of 2^-6 and 2^-8 on a scale of 1000 timesteps; a kink of Sana's attention may lie within the first.
        unit = 1e-3 if not isinstance(student.schedule, EDMSchedule) else 1e-3 * 2**-2
        off = []
        for step in (2**-6 * unit, 2**-8 * unit):
            expected = differences(student, at, velocity, step).flatten(1)
            off.append((change.flatten(1) - expected).norm(dim=1) / expected.norm(dim=1))
        assert bool((torch.minimum(*off) < 4e-3).all()), off
        # In float32 attention is the closed form, of every module that calls torch's or diffusers' dispatcher.
        at.student.denoiser.network.float()
        at.student.added["second_time"].float()
        with dispatch.counted() as ran:
            point = at.x_t.float(), at.t, at.conditioning, at.r
            _, single = student.velocity_and_derivative(*point, velocity.float())
        torch.testing.assert_close(single.to(change), change, rtol=0, atol=1e-4 * float(change.abs().max()))
        attended = {form: count for (name, form), count in ran.items() if name == "dual_attention"}
        assert attended.keys() == {"closed"}
        assert described(ran).startswith(f"dual attention (closed form) in {attended['closed']} place")


@pytest.mark.parametrize("family", TINY)
def test_derivatives_are_those_of_finite_differences(family: str):
    builder, call = TINY[family]
    pipeline = builder()
    check(pipeline, call, pipeline_folder.denoiser(pipeline))


def test_derivatives_of_every_family_of_the_folder(zoo_name: str, zoo: Path):
    pipeline = DiffusionPipeline.from_pretrained(zoo / zoo_name)
    check(pipeline, pipeline_folder.call_of(zoo, zoo_name, pipeline), pipeline_folder.denoiser(pipeline))


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
    assert "take --derivative central" in str(caught.value) and "\n" not in str(caught.value)


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
