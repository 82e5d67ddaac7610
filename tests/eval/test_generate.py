"""Sample i depends on (seed, i) alone, and the evaluations are counted."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from toy_models import tiny_ddim, tiny_dit, tiny_flow, tiny_named

from fewstep.errors import UserError
from fewstep.eval.conditions import SampleConditions
from fewstep.eval.generate import (
    NonFiniteImagesError,
    generate,
    sample_generator,
    to_uint8,
)
from fewstep.export.step_noise import step_noise_from
from fewstep.recording.call.invocation import condition_kind
from fewstep.recording.pipeline import modules_of

LABELS = SampleConditions("label", (3, 1, 4), (3, 1, 4))
PROMPTS = SampleConditions("prompt", ("a", "much longer words"))


def images(pipeline, call, conditions, batch_size, num=7, seed=5):
    batches = list(generate(pipeline, call, conditions, range(num), seed=seed, batch_size=batch_size))
    return torch.cat([batch.images for batch in batches]), batches


CASES = {
    "ddim": (tiny_ddim, {"num_inference_steps": 3}, SampleConditions()),
    "ddim with eta": (tiny_ddim, {"num_inference_steps": 3, "eta": 1.0}, SampleConditions()),
    "lcm": (
        lambda: tiny_dit(LCMScheduler(original_inference_steps=4, clip_sample=False)),
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        LABELS,
    ),
    "lcm, guidance doubles the batch": (
        lambda: tiny_dit(LCMScheduler(original_inference_steps=4, clip_sample=False)),
        {"num_inference_steps": 4, "guidance_scale": 2.0},
        LABELS,
    ),
    "flow ode": (tiny_flow, {"num_inference_steps": 3}, PROMPTS),
    "flow fresh": (lambda: tiny_flow(stochastic=True), {"num_inference_steps": 3}, PROMPTS),
}


@pytest.mark.parametrize("case", CASES)
def test_images_do_not_depend_on_the_batch_size(case):
    make, call, conditions = CASES[case]
    pipeline = make()
    one, _ = images(pipeline, call, conditions, 1)
    seven, _ = images(pipeline, call, conditions, 7)
    three, _ = images(pipeline, call, conditions, 3)
    assert one.dtype == torch.uint8 and one.shape[:2] == (7, 1)
    assert (one.int() - seven.int()).abs().max() <= 1
    assert (one.int() - three.int()).abs().max() <= 1
    # They are seven different pictures, and another seed gives others.
    assert len({image.numpy().tobytes() for image in one}) == 7
    assert not torch.equal(one, images(pipeline, call, conditions, 7, seed=6)[0])


def test_the_global_generator_is_neither_read_nor_moved():
    pipeline = tiny_flow(stochastic=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = images(pipeline, {"num_inference_steps": 3}, PROMPTS, 4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, images(pipeline, {"num_inference_steps": 3}, PROMPTS, 4)[0])


@pytest.mark.parametrize(
    ("make", "call", "conditions", "nfe"),
    [
        (tiny_ddim, {"num_inference_steps": 3}, SampleConditions(), 3),
        (tiny_dit, {"num_inference_steps": 3, "guidance_scale": 1.0}, LABELS, 3),
        (tiny_dit, {"num_inference_steps": 3, "guidance_scale": 2.0}, LABELS, 6),
        (tiny_flow, {"num_inference_steps": 3}, PROMPTS, 3),
        (tiny_flow, {"num_inference_steps": 3, "guidance_scale": 2.0}, PROMPTS, 6),
    ],
)
def test_evaluations_are_counted_with_their_guidance(make, call, conditions, nfe):
    pipeline = make()
    _, batches = images(pipeline, call, conditions, 4)
    assert [batch.evaluations for batch in batches] == [nfe, nfe]
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    assert not denoiser._forward_hooks


@pytest.mark.parametrize(
    ("call", "nfe"),
    [
        ({"num_inference_steps": 1}, 1),
        ({"num_inference_steps": 5}, 5),
        ({"num_inference_steps": 5, "guidance_scale": 2.0}, 10),
    ],
)
def test_denoisers_are_found_by_what_they_do(call, nfe):
    """Whatever they are called, and however many they are; what reads or steers is no evaluation."""
    pipeline = tiny_named()
    _, batches = images(pipeline, call, PROMPTS, 4)
    assert [batch.evaluations for batch in batches] == [nfe, nfe]
    assert not any(network._forward_hooks for network in modules_of(pipeline).values())
    assert "step" not in vars(pipeline.scheduler)


def test_evaluations_that_cannot_be_seen_are_not_called_none():
    pipeline = tiny_flow()
    pipeline.scheduler.set_timesteps = lambda count: setattr(pipeline.scheduler, "timesteps", [])
    with pytest.raises(UserError, match="calls no network before its scheduler's steps"):
        images(pipeline, {"num_inference_steps": 1}, PROMPTS, 4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, LCMScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_scheduler_is_put_back_and_keeps_its_signature(scheduler):
    pipeline = tiny_dit(scheduler())
    before = inspect.signature(pipeline.scheduler.step)
    with pytest.raises(RuntimeError, match="stop"), step_noise_from(pipeline, [sample_generator(0, 0)]):
        assert "step" in vars(pipeline.scheduler)
        assert inspect.signature(pipeline.scheduler.step) == before
        raise RuntimeError("stop")
    assert "step" not in vars(pipeline.scheduler)


def test_a_generator_that_the_pipeline_passes_is_left_alone():
    pipeline = tiny_dit(LCMScheduler(original_inference_steps=4, clip_sample=False))
    scheduler = pipeline.scheduler
    x = torch.zeros(1, 1, 4, 4)

    def step(own=None, forwarded=None):
        scheduler.set_timesteps(4)
        with step_noise_from(pipeline, [own or sample_generator(0, 1)]):
            return scheduler.step(x, 999, x, generator=forwarded, return_dict=False)[0]

    assert torch.equal(step(forwarded=[sample_generator(0, 2)]), step(own=sample_generator(0, 2)))
    assert not torch.equal(step(forwarded=[sample_generator(0, 2)]), step())


def test_the_progress_bar_setting_survives():
    pipeline = tiny_ddim()
    pipeline.set_progress_bar_config(desc="mine")
    images(pipeline, {"num_inference_steps": 1}, SampleConditions(), 7)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_rounding_is_half_up_and_clipped():
    values = np.array([-0.2, 0.0, 0.49 / 255, 0.5 / 255, 254.4 / 255, 1.0, 1.7], dtype=np.float32)
    assert to_uint8([values.reshape(1, 7, 1)]).flatten().tolist() == [0, 0, 0, 1, 254, 255, 255]
    assert to_uint8(np.zeros((2, 5, 8, 6, 3))).shape == (2, 5, 3, 8, 6)
    with pytest.raises(NonFiniteImagesError):
        to_uint8(np.full((1, 2, 2, 1), np.nan))


def test_conditions_are_a_function_of_the_index():
    assert LABELS.take([0, 1, 2, 3, 7]) == [3, 1, 4, 3, 1]
    assert LABELS.take_labels([2, 3]).tolist() == [4, 3]
    with pytest.raises(ValueError, match="no prompts"):
        SampleConditions("prompt", ())
    assert [condition_kind(type(make())) for make in (tiny_ddim, tiny_dit, tiny_flow)] == [None, "label", "prompt"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="DDIMPipeline takes no argument heigth"):
        images(tiny_ddim(), {"heigth": 3}, SampleConditions(), 4)
    with pytest.raises(ValueError, match="batch size"):
        images(tiny_ddim(), {}, SampleConditions(), 0)
