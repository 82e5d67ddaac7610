"""The check at export: wrong schedulers run, their grids look right, and the walk says no."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from fewstep.diffusion.strategic import Move
from fewstep.export import SchedulerCheckError, plan_student
from fewstep.export.walk.plan import check_student, reference_of
from fewstep.recording.pipeline import with_parts
from fewstep.recording.watch.shake import shaken


@pytest.fixture
def walk_with(recorded):
    """Check a tiny teacher under another scheduler, everything else as planned."""

    def run(name, scheduler, renoise="ode", steps=4):
        recording = recorded(name)
        plan = plan_student(recording, steps, renoise=renoise)
        pipeline = with_parts(recording.pipeline, scheduler=scheduler)
        reference = reference_of(recording, recording.networks)
        return check_student(recording, pipeline, plan.call, Move(renoise), steps, reference)

    return run


def table(recorded, **changes):
    right = plan_student(recorded("stable_diffusion"), 4, renoise="ode").scheduler
    return DDIMScheduler.from_config(right.config, **changes)


def test_planned_scheduler_holds(recorded, walk_with):
    walk = walk_with("stable_diffusion", table(recorded))
    assert walk.timesteps == (999, 749, 499, 249)
    assert walk.deviation < 1


def test_swapped_betas(recorded, walk_with):
    with pytest.raises(SchedulerCheckError, match="step 1 of 4"):
        walk_with("stable_diffusion", table(recorded, trained_betas=None, beta_schedule="linear"))


def test_swapped_betas_with_fresh_noise(walk_with):
    with pytest.raises(SchedulerCheckError, match="teacher's x_t"):
        walk_with("stable_diffusion", LCMScheduler(original_inference_steps=4, beta_schedule="linear"), "fresh")


def test_one_wrong_entry(recorded, walk_with):
    betas = list(table(recorded).config.trained_betas)
    betas[600:] = [beta * 1.01 for beta in betas[600:]]
    with pytest.raises(SchedulerCheckError, match="step 1 of 4"):
        walk_with("stable_diffusion", table(recorded, trained_betas=betas))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample": True},
        {"set_alpha_to_one": False},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"timestep_spacing": "linspace"},
    ],
)
def test_other_ways_to_be_wrong(recorded, walk_with, changes):
    with pytest.raises(SchedulerCheckError):
        walk_with("stable_diffusion", table(recorded, **changes))


def test_flow_scheduler_with_its_own_corrections(walk_with):
    with pytest.raises(SchedulerCheckError, match="descend"):
        walk_with("flow", FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True))
    with pytest.raises(SchedulerCheckError, match="teacher's x_t"):
        walk_with("flow", FlowMatchLCMScheduler(shift=3.0))  # renoises


def test_ode_is_not_fresh_noise(recorded, walk_with):
    with pytest.raises(SchedulerCheckError, match="draws no fresh noise"):
        walk_with("stable_diffusion", table(recorded), "fresh")
    with pytest.raises(SchedulerCheckError, match="teacher's x_t"):
        walk_with("stable_diffusion", plan_student(recorded("stable_diffusion"), 4).scheduler, "ode")


def test_a_scheduler_whose_sample_is_scaled(recorded, walk_with):
    betas = table(recorded).config.trained_betas
    euler = EulerDiscreteScheduler(trained_betas=betas, timestep_spacing="trailing")
    assert walk_with("stable_diffusion", euler).timesteps == (999, 749, 499, 249)
    other = EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="trailing")
    with pytest.raises(SchedulerCheckError):
        walk_with("stable_diffusion", other)


def test_a_network_that_is_fed_another_time(recorded):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 2, renoise="ode")

    class Off(DDIMScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.scale_model_input = lambda sample, timestep=None: sample * 0.9

    with shaken(recording.network):
        pipeline = with_parts(recording.pipeline, scheduler=Off.from_config(plan.scheduler.config))
        with pytest.raises(SchedulerCheckError):
            check_student(recording, pipeline, plan.call, Move("ode"), 2, reference_of(recording, recording.networks))


def test_other_weights_are_seen(recorded, trained):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 1)
    pipeline = with_parts(recording.pipeline, scheduler=plan.scheduler, unet=trained(recording))
    with pytest.raises(SchedulerCheckError, match="does not feed the network"):
        check_student(recording, pipeline, plan.call, plan.move, 1, reference_of(recording, recording.networks))


def test_nan_fails():
    from fewstep.export.walk.demand import demand

    with pytest.raises(SchedulerCheckError, match="off by nan"):
        demand(torch.tensor([float("nan")]), torch.zeros(1), 1.0, "x")


def test_walk_needs_no_reacting_network(recorded):
    recording = recorded("flow")
    plan = plan_student(recording, 2)
    dead = copy.deepcopy(recording.network)
    for parameter in dead.parameters():
        torch.nn.init.zeros_(parameter)
    wrong = with_parts(recording.pipeline, scheduler=FlowMatchLCMScheduler(shift=3.0), transformer=dead)
    with pytest.raises(SchedulerCheckError, match="teacher's x_t"):
        check_student(recording, wrong, plan.call, Move("ode"), 2, reference_of(recording, {recording.component: dead}))
