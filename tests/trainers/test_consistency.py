"""Consistency's own class on small real networks: who learns, the boundary, and the scheduler's function."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from torch import Tensor
from toys import Labels, labels, make_loop

from fewstep.data.batch import Batch, Real
from fewstep.diffusion.discretization import SigmaRange
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, from_scheduler
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.trainers.consistency import Consistency
from tests.trainers.toy_consistency import config, vector_method

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE, _ = from_scheduler(LCMScheduler(**SD))
FAMILIES = [(TABLE, "epsilon"), (TABLE, "v_prediction"), (FlowSchedule(), "flow"), (EDMSchedule(), "edm")]
every_family = pytest.mark.parametrize(("schedule", "kind"), FAMILIES, ids=["epsilon", "v", "flow", "edm"])
every_variant = pytest.mark.parametrize("variant", ["lcm", "cd", "ct", "ict", "ect"])


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
