"""A teacher whose shift depends on its call: the student is planned at the call that was recorded."""

import json
import math

import pytest
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_pipelines import TINY, tiny_flow

from fewstep.export import ExportError, plan_student
from fewstep.export.errors import SchedulerCheckError
from fewstep.export.walk.plan import check_student, reference_of, student_call
from fewstep.export.walk.teacher_shift import shifts_by_size, teacher_shift
from fewstep.recording import record
from fewstep.recording.pipeline import find_scheduler, with_parts

FLUX = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def by_size(pipeline, **config):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **config)
    return pipeline


def mu_of(tokens):
    """The line through (256, 0.5) and (4096, 1.15) that Flux's pipeline draws."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


class ByFrames(StableDiffusion3Pipeline):
    """Shifts by arguments that change no shape of the sample, as others do by frames, steps or the prompt's length."""

    def __call__(
        self,
        prompt=None,
        height=16,
        width=16,
        num_inference_steps=50,
        guidance_scale=7.0,
        num_frames=81,
        max_sequence_length=8,
        generator=None,
        output_type="pil",
    ):
        """Call with the shift 1 + frames / 100 + steps / 1000 + length / 10."""
        mu = math.log(1 + num_frames / 100 + num_inference_steps / 1000 + max_sequence_length / 10)
        return super().__call__(
            prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=max_sequence_length,
            generator=generator,
            output_type=output_type,
            sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)],
            mu=mu,
        )


def by_frames(**call):
    pipeline = ByFrames(**tiny_flow().components)
    pipeline.set_progress_bar_config(disable=True)
    return record(by_size(pipeline), prompt="the cat", **call)


@pytest.mark.parametrize(("side", "shift"), [(8, 1.583), (64, 1.878)])
def test_flux_is_shifted_by_the_tokens_of_the_recorded_size(zoo, side, shift):
    call = json.loads((zoo / "manifest.json").read_text())["Flux"]["call"]
    pipeline = by_size(DiffusionPipeline.from_pretrained(zoo / "Flux"), **FLUX)
    recording = record(pipeline, **{**call, "height": side, "width": side})
    assert recording.sample_shape[0] == (side // 2) ** 2  # tokens
    assert teacher_shift(recording) == pytest.approx(math.exp(mu_of((side // 2) ** 2)), rel=1e-6)
    plan = plan_student(recording, 4)
    assert plan.shift == pytest.approx(shift, abs=1e-3)
    assert plan.grid == pytest.approx([plan.shift * i / (4 + (plan.shift - 1) * i) for i in (4, 3, 2, 1)], rel=1e-5)


@pytest.mark.parametrize("height", [16, 24, 32])
def test_stable_diffusion_3_is_shifted_at_the_recorded_height(height):
    call = {**TINY["flow"][1], "height": height}
    recording = record(by_size(tiny_flow(), **FLUX), **call)
    tokens = height // 2 // 2 * call["width"] // 2 // 2
    assert teacher_shift(recording) == pytest.approx(math.exp(mu_of(tokens)), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "shift"),
    [
        ({}, 1 + 0.81 + 0.05 + 0.8),
        ({"num_frames": 17}, 1 + 0.17 + 0.05 + 0.8),
        ({"num_inference_steps": 28}, 1 + 0.81 + 0.028 + 0.8),
        ({"max_sequence_length": 12}, 1 + 0.81 + 0.05 + 1.2),
        ({"num_frames": 9, "num_inference_steps": 20, "max_sequence_length": 10}, 1 + 0.09 + 0.02 + 1.0),
    ],
)
def test_nothing_that_the_call_says_is_lost(call, shift):
    recording = by_frames(**call)
    assert teacher_shift(recording) == pytest.approx(shift, rel=1e-6)
    plan = plan_student(recording, 4)
    assert plan.shift == pytest.approx(shift, rel=1e-6)
    assert all(plan.call[name] == value for name, value in call.items() if name != "num_inference_steps")


def test_a_stretched_teacher_is_shifted_by_what_it_was_asked_for():
    recording = by_frames()
    recording.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    assert teacher_shift(recording) == pytest.approx(2.66, rel=1e-6)


def test_a_scheduler_that_makes_another_grid_of_the_shift_is_refused():
    class Squared(FlowMatchEulerDiscreteScheduler):
        def time_shift(self, mu, sigma, t):
            return super().time_shift(mu, sigma, t) ** 2

    pipeline = ByFrames(**tiny_flow().components)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(by_size(pipeline), prompt="the cat")
    pipeline.scheduler = Squared(use_dynamic_shifting=True)
    with pytest.raises(ExportError, match="--shift") as caught:
        teacher_shift(recording)
    assert "\n" not in str(caught.value)
    assert plan_student(recording, 2, shift=2.0).shift == 2.0


def test_a_walk_at_another_size_than_the_recorded_one_is_refused(recorded):
    recording = recorded("flow")
    plan = plan_student(recording, 2)
    pipeline = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): plan.scheduler})
    reference = reference_of(recording, recording.networks)
    lost = {name: value for name, value in student_call(recording, 2).items() if name not in ("height", "width")}
    with pytest.raises(SchedulerCheckError, match="not the recorded one"):
        check_student(recording, pipeline, {**lost, "height": 24, "width": 24}, plan.move, 2, reference)


@pytest.mark.parametrize("shift", [1e5, 1e9, 1e-6])
def test_steps_that_do_not_descend_are_refused(recorded, shift):
    # At 1e5 the four timesteps read 1000, 1000, 1000, 1000; at 1e9 they are equal.
    with pytest.raises(ExportError, match="told apart") as caught:
        plan_student(recorded("flow"), 4, shift=shift)
    assert "\n" not in str(caught.value)


def test_a_teacher_whose_own_shift_leaves_no_steps_is_refused():
    with pytest.raises(ExportError, match="told apart"):
        plan_student(by_frames(num_frames=10_000_000), 4)


def test_two_times_that_the_network_is_told_as_one_are_refused(recorded):
    # A network of integer times: 1000, 999.7 ... are one to it.
    import dataclasses

    recording = recorded("flow")
    (rule,) = recording.recipe.times
    whole = dataclasses.replace(rule, dtype="int64", to_integer="round")
    rounded = dataclasses.replace(recording, recipe=dataclasses.replace(recording.recipe, times=(whole,)))
    assert shifts_by_size(rounded) is False
    with pytest.raises(ExportError, match="two of which are the same"):
        plan_student(rounded, 4, shift=900.0)
