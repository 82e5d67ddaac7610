"""Which scheduler carries a student, and on which grid."""

import copy
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import TINY, tiny_edm, tiny_flow, tiny_stable_diffusion

from fewstep.export import ExportError, plan_student
from fewstep.export.errors import NoRenoisingError
from fewstep.export.walk.teacher_shift import teacher_shift
from fewstep.recording import record
from tests.recording.picture_pipeline import items_of, picture_pipeline


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", list(TINY))
def test_every_family_plans(recorded, name, steps, renoise):
    impossible = renoise == "fresh" and name in ("ddim", "edm")
    if impossible:
        with pytest.raises(NoRenoisingError) as caught:
            plan_student(recorded(name), steps, renoise=renoise)
        assert "\n" not in str(caught.value)
        return
    plan = plan_student(recorded(name), steps, renoise=renoise)
    assert (plan.steps, plan.renoise) == (steps, renoise)
    assert len(plan.grid) == len(plan.timesteps) == steps
    assert plan.grid[0] == 1.0
    assert plan.grids[steps] == plan.grid
    assert steps in plan.counts
    assert plan.call["num_inference_steps"] == steps
    assert json.loads(json.dumps(plan.call)) == plan.call


def test_auto_is_ode_for_flow_and_edm_and_fresh_for_tables_where_it_ships(recorded):
    assert plan_student(recorded("flow"), 2).renoise == "ode"
    assert plan_student(recorded("edm"), 2).renoise == "ode"
    assert plan_student(recorded("stable_diffusion"), 2).renoise == "fresh"
    unconditional = plan_student(recorded("ddim"), 2)
    assert unconditional.renoise == "ode"
    assert "eta" in unconditional.note
    assert "\n" not in unconditional.note


def test_dmd2_grid(recorded):
    plan = plan_student(recorded("stable_diffusion"), 4)
    assert plan.timesteps == (999, 749, 499, 249)
    assert plan.grid == (1, 0.75, 0.5, 0.25)
    assert plan.counts == (1, 2, 3, 4)
    assert plan.call["guidance_scale"] == 1.0
    assert plan.noise_follows == "generator"


def test_noise_of_dit_follows_the_global_seed(recorded):
    assert plan_student(recorded("dit"), 2, renoise="fresh").noise_follows == "global seed"
    assert plan_student(recorded("dit"), 2, renoise="ode").noise_follows is None


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_shifted_flow_grid(recorded, renoise):
    plan = plan_student(recorded("flow"), 4, renoise=renoise)  # its teacher has shift 3
    assert plan.shift == 3
    assert plan.grid == pytest.approx((1, 0.9, 0.75, 0.5), abs=1e-6)
    # A stretched grid divides by zero at one step.
    assert plan.counts == ((1, 2, 3, 4) if renoise == "ode" else (2, 3, 4))
    assert plan_student(recorded("flow"), 4, renoise=renoise, shift=1).grid == pytest.approx(
        (1, 0.75, 0.5, 0.25), abs=1e-6
    )


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 7.0])
def test_a_stretched_grid_never_starts_at_its_end(recorded, shift):
    # With some shifts rounding turns the division by zero at one step into the grid's last time.
    for steps in (2, 3, 4):
        plan = plan_student(recorded("flow"), steps, renoise="fresh", shift=shift)
        assert plan.grid == pytest.approx(
            [shift * i / (steps + (shift - 1) * i) for i in range(steps, 0, -1)], abs=1e-6
        )
        assert all(grid[0] == pytest.approx(1) for grid in plan.grids.values())


@pytest.mark.parametrize(("first", "length"), [(399, 400), (625, 626)])
def test_one_step_from_below_the_top(recorded, first, length):
    plan = plan_student(recorded("stable_diffusion"), 1, first_timestep=first)
    assert plan.timesteps == (first,)
    assert plan.grid == (length / 1000,)
    assert plan.scheduler.config.num_train_timesteps == length
    assert plan.initial_scale == 1.0


def test_marginal_start_is_sigma_times_noise(recorded):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 1, first_timestep=625, start="marginal")
    sigma = float(recording.schedule.coefficients(torch.tensor([0.626], dtype=torch.float64)).sigma)
    assert plan.initial_scale == pytest.approx(sigma, rel=1e-5)
    assert plan.initial_scale == pytest.approx(0.9286, abs=1e-3)
    # Its samples are x_t / alpha between the steps; the walk sees through that.
    four = plan_student(recording, 4, start="marginal")
    assert (type(four.scheduler), four.timesteps) == (EulerDiscreteScheduler, (999, 749, 499, 249))


def test_count_that_does_not_divide_the_table(recorded):
    # DDIM goes from 332 to the alpha of 333; order 1 of DPM-Solver goes where the network is asked next.
    plan = plan_student(recorded("stable_diffusion"), 3, renoise="ode")
    assert isinstance(plan.scheduler, DPMSolverMultistepScheduler)
    assert plan.timesteps == (999, 666, 332)
    assert 3 not in plan_student(recorded("stable_diffusion"), 4, renoise="ode").counts
    with pytest.raises(ExportError):
        plan_student(recorded("ddim"), 3)  # its pipeline passes eta, which the solver does not take


def test_edm_grid_is_even_on_the_ramp(recorded):
    plan = plan_student(recorded("edm"), 4)
    assert plan.grid == pytest.approx((1, 0.75, 0.5, 0.25), abs=1e-5)
    assert plan.initial_scale == pytest.approx(6401**0.5, rel=1e-6)
    assert plan.counts == (1, 2, 3, 4)
    assert plan.prediction_type == "edm"


@pytest.mark.parametrize("steps", [1, 2])
def test_an_edm_student_may_start_below_the_top(recorded, steps):
    schedule = recorded("edm").schedule
    plan = plan_student(recorded("edm"), steps, first_sigma=2.5)
    sigmas = schedule.coefficients(torch.tensor(plan.grid, dtype=torch.float64)).sigma
    assert float(sigmas[0]) == pytest.approx(2.5, rel=1e-5)
    assert plan.grid == pytest.approx([plan.grid[0] * (steps - k) / steps for k in range(steps)], rel=1e-5)
    assert plan.initial_scale == pytest.approx(7.25**0.5, rel=1e-6)
    assert plan.counts == tuple(range(1, steps + 1))


@pytest.mark.parametrize(("family", "first"), [("edm", 100.0), ("edm", 0.001), ("flow", 2.5), ("ddim", 2.5)])
def test_a_first_sigma_that_the_teacher_lacks_is_refused(recorded, family, first):
    with pytest.raises(ExportError, match="first_sigma"):
        plan_student(recorded(family), 1, first_sigma=first)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_prediction_types(kind):
    recording = record(tiny_stable_diffusion(kind), prompt="the cat")
    for renoise in ("ode", "fresh"):
        plan = plan_student(recording, 2, renoise=renoise)
        assert plan.scheduler.config.prediction_type == plan.prediction_type == kind


def test_zero_terminal_snr():
    def teacher(kind):
        pipeline = tiny_stable_diffusion(kind)
        # Its own "leading" grid never visits the top, where noise prediction says nothing.
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
        return record(pipeline, prompt="the cat")

    for renoise in ("ode", "fresh"):
        plan = plan_student(teacher("v_prediction"), 2, renoise=renoise)
        assert float(plan.scheduler.alphas_cumprod[-1]) == 0
    with pytest.raises(ExportError, match="first_timestep=998"):
        plan_student(teacher("epsilon"), 2)
    assert plan_student(teacher("epsilon"), 1, first_timestep=998).timesteps == (998,)


def test_teacher_with_euler_scheduler_keeps_its_table():
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    plan = plan_student(record(pipeline, prompt="the cat"), 4)
    assert plan.timesteps == (999, 749, 499, 249)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_resolution_dependent_shift_is_evaluated_at_the_recorded_call(kind):
    pipeline = tiny_flow()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    _, call = TINY["flow"]
    shift = teacher_shift(record(pipeline, **call))
    assert shift > 0 and shift != 1
    plan = plan_student(record(pipeline, **call), 2)
    assert plan.shift == shift
    assert plan.grid == pytest.approx((1, shift / (1 + shift)), rel=1e-4)
    assert not plan.scheduler.config.get("use_dynamic_shifting", False)
    assert "recorded size" in plan.note


def test_shift_of_a_multistep_flow_teacher():
    pipeline = tiny_flow()
    pipeline.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction", num_train_timesteps=1000
    )
    _, call = TINY["flow"]
    plan = plan_student(record(pipeline, **call), 4)
    assert plan.grid == pytest.approx((1, 0.9375, 0.8333333, 0.625), abs=1e-6)


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": -2}, "at least 1"),
        ({"steps": 1001}, "1000 times"),
        ({"steps": 4, "first_timestep": 2}, "3 times"),
        ({"steps": 1, "first_timestep": 1000}, "0..999"),
        ({"steps": 2, "shift": 3.0}, "flow-matching"),
        ({"steps": 2, "renoise": "often"}, "often"),
        ({"steps": 2, "start": "zero"}, "zero"),
    ],
)
def test_refusals_are_one_line(recorded, wish, word):
    with pytest.raises(ExportError, match=word) as caught:
        plan_student(recorded("stable_diffusion"), **wish)
    assert "\n" not in str(caught.value)


def test_refusals_of_flow_and_edm(recorded):
    with pytest.raises(ExportError, match="positive"):
        plan_student(recorded("flow"), 2, shift=-1)
    with pytest.raises(ExportError, match="pure noise"):
        plan_student(recorded("flow"), 2, first_timestep=399)
    with pytest.raises(ExportError, match="sigma_max"):
        plan_student(recorded("edm"), 2, first_timestep=399)
    with pytest.raises(ExportError, match="1000 times"):
        plan_student(recorded("flow"), 1001)


def test_planning_leaves_pipeline_and_random_state_alone():
    pipeline = tiny_edm()
    recording = record(pipeline, prompt="the cat", negative_prompt="dog")
    pipeline.unet.train()
    scheduler, config, state = pipeline.scheduler, copy.deepcopy(dict(pipeline.config)), torch.get_rng_state()
    plan = plan_student(recording, 2)
    assert pipeline.scheduler is scheduler
    assert dict(pipeline.config) == config
    assert pipeline.unet.training
    assert "step" not in vars(scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    assert "negative_prompt" not in plan.call


def test_half_precision_does_not_hide_a_wrong_entry():
    pipeline = tiny_stable_diffusion().to(dtype=torch.bfloat16)
    plan = plan_student(record(pipeline, prompt="the cat"), 4, renoise="ode")
    assert plan.counts == (1, 2, 4)  # at 3 steps DDIM is one table entry off


@pytest.mark.parametrize("way", ["drawn", "global_draw"])
def test_what_a_pipeline_draws_for_a_picture_is_drawn_as_it_was_recorded(way: str) -> None:
    """SD3's control is drawn from the global random state, which no generator of the call seeds."""
    teacher = record(picture_pipeline(way), items=items_of(way))
    for steps in (1, 2, 4):
        assert plan_student(teacher, steps, renoise="ode").steps == steps
