"""Samplers that users swap in: made of the student's scheduler they land on its grid."""

import copy

import diffusers
import pytest
import torch
from diffusers import LCMScheduler

from fewstep.diffusion.strategic import Move
from fewstep.export import plan_student
from fewstep.export.card.sampling import samplers
from fewstep.export.walk.plan import check_student
from fewstep.recording.pipeline import with_parts

SWAPPED = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "TCDScheduler",
)


def from_folder(scheduler, folder):
    """The scheduler as a user gets it."""
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", SWAPPED)
def test_a_swapped_sampler_visits_the_trained_times(recorded, tmp_path, name, steps):
    plan = plan_student(recorded("stable_diffusion"), steps, renoise="fresh")
    shipped = from_folder(plan.scheduler, tmp_path)
    other = getattr(diffusers, name).from_config(shipped.config)
    other.set_timesteps(steps)
    assert [float(t) for t in other.timesteps] == list(plan.timesteps)
    assert torch.allclose(other.alphas_cumprod, shipped.alphas_cumprod)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_first_order_sampler_makes_the_students_own_ode_step(recorded, tmp_path, name):
    # The oracle: the walk, which knows x0 and the noise of every step.
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 4, renoise="fresh")
    other = getattr(diffusers, name).from_config(from_folder(plan.scheduler, tmp_path).config)
    pipeline = with_parts(recording.pipeline, scheduler=other)
    assert check_student(recording, pipeline, plan.call, Move("ode"), 4).grid == plan.grid


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_lcm_itself_reads_no_spacing(recorded, steps):
    plan = plan_student(recorded("stable_diffusion"), steps, renoise="fresh")
    assert type(plan.scheduler) is LCMScheduler
    config = dict(plan.scheduler.config)
    assert config["timestep_spacing"] == "trailing"
    plain = LCMScheduler.from_config({**config, "timestep_spacing": "leading", "_use_default_values": []})
    x, answer = torch.randn(2, 1, 4, 8, 8)
    for count in plan.counts:
        results = []
        for scheduler in (copy.deepcopy(plan.scheduler), plain):
            scheduler.set_timesteps(count)
            generator, sample, walked = torch.Generator().manual_seed(0), x, []
            for timestep in scheduler.timesteps:
                sample, x0 = scheduler.step(answer, timestep, sample, generator=generator, return_dict=False)
                walked += [sample, x0]
            results.append((scheduler.timesteps.tolist(), walked))
        assert results[0][0] == results[1][0]
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_card_names_the_samplers_that_land_and_no_others(recorded):
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 4, renoise="fresh")
    pipeline = with_parts(recording.pipeline, scheduler=plan.scheduler)
    text = samplers({"steps": 4, "timesteps": plan.timesteps}, pipeline)
    assert all(f"`{name}`" in text for name in SWAPPED)
    assert "`LCMScheduler`" not in text  # it is the student's own
    three = plan_student(recording, 3, renoise="ode")
    odd = samplers(
        {"steps": 3, "timesteps": three.timesteps}, with_parts(recording.pipeline, scheduler=three.scheduler)
    )
    assert "TCDScheduler" not in odd
    flow = recorded("flow")
    shipped = plan_student(flow, 4)
    assert (
        samplers({"steps": 4, "timesteps": shipped.timesteps}, with_parts(flow.pipeline, scheduler=shipped.scheduler))
        == ""
    )
