"""A control network in the step: recorded with the denoiser, proven, switched by time, and shared by all roles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from controlled_pipeline import controlled_items, controlled_pipeline
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from tiny_pipelines import tiny_stable_diffusion

from fewstep.conditioning.conditioning import Conditioning
from fewstep.export import plan_student
from fewstep.export.errors import ExportError
from fewstep.export.student import Student
from fewstep.export.walk.control import as_walked
from fewstep.networks.make_roles import RoleSettings, make_roles
from fewstep.recording import Recipe, Recording, RecordingError, record


def recorded(way: str = "", **call: Any) -> Recording:
    return record(controlled_pipeline(way), items=controlled_items(), **call)


@pytest.fixture(scope="module")
def switched() -> Recording:
    """Of a control that is on in the first 60 % of the steps."""
    return recorded(control_end=0.6)


@pytest.mark.parametrize("call", [{}, {"control_end": 0.6}, {"control_start": 0.3}], ids=str)
def test_a_control_network_is_recorded_and_proven(call: dict[str, Any]) -> None:
    recording = recorded(**call)
    proof = recording.prove()
    errors = {check.name: check.error for check in proof.checks}
    assert errors["unguided, one sample"] <= 1e-6 and errors["unguided, another item and draw"] <= 1e-6
    assert errors["unguided, two items in one call"] <= 5e-6
    assert proof.swapped is not None and proof.swapped >= 1e-3
    assert not proof.warnings and not proof.shaken
    second = recording.recipe.second
    assert second is not None and second.network is recording.pipeline.control
    assert [(link.argument, link.path, link.form) for link in second.links] == [
        ("residuals", (0,), "tuple"),
        ("middle", (1,), "tensor"),
    ]
    assert (second.switch is None) == (call == {})
    text = recording.recipe.to_json()
    assert Recipe.from_json(text, recording.pipeline.control) == recording.recipe
    with pytest.raises(ValueError, match="calls a second network, control; give it too"):
        Recipe.from_json(text)
    assert "control (ControlNetwork) gives residuals, middle" in recording.summary()
    assert "control.condition: float32[1, 3, 4, 4], 1 rows per sample" in recording.summary()


def test_answers_under_keys_keep_them() -> None:
    pipeline = controlled_pipeline()
    pipeline.control.keyed = True
    recording = record(pipeline, items=controlled_items())
    assert all(check.error <= 5e-6 for check in recording.prove().checks)
    second = recording.recipe.second
    assert second is not None
    assert [(link.path, link.form) for link in second.links] == [((0,), "dict"), ((1,), "tensor")]
    assert Recipe.from_json(recording.recipe.to_json(), pipeline.control) == recording.recipe


def test_a_control_made_of_the_networks_own_weights_is_refused() -> None:
    pipeline = controlled_pipeline()
    pipeline.control.enter = pipeline.network.enter
    words = (
        r"^control \(ControlNetwork\) is made of 2 weights of network itself, .*; distil the pipeline without control$"
    )
    with pytest.raises(RecordingError, match=words):
        record(pipeline, items=controlled_items())


@pytest.mark.parametrize("way", ["", "once"])
def test_guided_answers_are_under_control_too(way: str) -> None:
    """One call of the control network may serve both, and what is None in one of them need not be said in the other."""
    recording = recorded(way, guidance_scale=4.0)
    errors = {check.name: check.error for check in recording.prove().checks}
    assert errors["guided, each answer"] <= 1e-6 and errors["guided, combined"] <= 1e-6
    ((negative,),) = recording.negative_each(items=controlled_items(1))
    positive = recording.condition_each(items=controlled_items(1))[0].arguments()
    told = negative.arguments()
    assert torch.equal(told["control"]["condition"], positive["control"]["condition"])
    assert torch.equal(told["control"]["text"], positive["control"]["text"]) == (way == "once")
    assert not bool(told["text"].any())


def test_a_control_of_one_half_alone_is_refused_by_its_switch() -> None:
    words = "control is asked for 1 of the 2 answers that network gives, which is not understood; give guess=False"
    with pytest.raises(RecordingError, match=words):
        recorded(guidance_scale=4.0, guess=True)


def test_the_switch_lies_where_the_teacher_switches_at_its_own_number_of_steps(switched: Recording) -> None:
    second = switched.recipe.second
    assert second is not None and second.switch is not None
    steps = switched.subject.run(25).steps
    times = torch.tensor([step.timestep for step in steps], dtype=torch.float64)
    assert second.switch.on(times).tolist() == [True] * 15 + [False] * 10
    assert second.switch.lowest == pytest.approx(steps[14].timestep, abs=1) and second.switch.highest == math.inf


def test_off_the_network_is_told_zeros_and_mixed_batches_are_right(switched: Recording) -> None:
    """One call serves samples at which it is on and samples at which it is off."""
    told = switched.condition(items=controlled_items(2))
    x, at = torch.randn(2, *switched.sample_shape), torch.tensor([900.0, 20.0], dtype=torch.float64)
    pipeline = switched.pipeline
    with torch.no_grad():
        before = pipeline.control.calls
        both = switched.recipe.call(switched.network, x, at, told)
        assert pipeline.control.calls == before + 1
        text = told.arguments()["text"]
        for row, scale in ((0, 0.8), (1, 0.0)):
            one = slice(row, row + 1)
            condition = told.arguments()["control"]["condition"][one]
            residuals, middle = pipeline.control(x[one], at[one].float(), text[one], condition, scale)
            alone = pipeline.network(x[one], at[one].float(), text[one], tuple(residuals), middle)[0]
            torch.testing.assert_close(both[one], alone, rtol=0, atol=1e-6)


def test_a_gradient_goes_to_the_sample_through_the_control(switched: Recording) -> None:
    told = switched.condition(items=controlled_items(1))
    at = torch.tensor([900.0], dtype=torch.float64)
    x = torch.randn(1, *switched.sample_shape, generator=torch.Generator().manual_seed(0))

    def total(x: torch.Tensor) -> torch.Tensor:
        return switched.recipe.call(switched.network, x, at, told).double().square().sum()

    (gradient,) = torch.autograd.grad(total(x.requires_grad_()), x)
    step = 1e-2 * torch.sign(gradient)
    with torch.no_grad():
        rise = float(total(x + step) - total(x - step)) / 2
    assert rise == pytest.approx(float((gradient * step).sum()), rel=1e-2)


def test_roles_share_one_frozen_control(switched: Recording) -> None:
    shared(switched, as_walked(switched, switched.pipeline, {}, 4), 0)
    assert all(parameter.requires_grad for parameter in switched.pipeline.control.parameters())


def shared(teacher: Recording, student: Recording, rank: int) -> None:
    """All roles call one control network, which nobody trains, and the student's are switched as the student walks."""
    roles = make_roles(RoleSettings(rank, ema=True), teacher, ("student", "critic"), torch.device("cpu"), student)
    seconds = {name: role.single.denoiser.recipe.second for name, role in roles.items()}
    assert len({id(second.network) for second in seconds.values() if second is not None}) == 1
    for name, second in seconds.items():
        own = student if name in ("student", "ema") else teacher
        assert second is not None and own.recipe.second is not None and second.switch == own.recipe.second.switch
        assert not any(parameter.requires_grad for parameter in second.network.parameters())
        assert own.recipe.second.network is not second.network
    assert len(list(roles["student"].named_parameters())) > 0


def test_a_student_walks_as_its_own_call_switches(switched: Recording) -> None:
    plan = plan_student(switched, 4)
    student = Student.of(switched, plan)
    second = student.recording.recipe.second
    assert second is not None and second.switch is not None
    at = torch.tensor(plan.timesteps, dtype=torch.float64)
    assert second.switch.on(at).tolist() == [True, True, False, False]
    # One step is never under control, and with three the second one is off, which is on in four.
    assert 1 not in plan.counts and plan.counts[-1] == 4
    with pytest.raises(ExportError, match=r"never switches its control on in 1 step, .* take more steps"):
        plan_student(switched, 1)


def test_a_teacher_without_a_switch_walks_as_ever() -> None:
    recording = recorded()
    plan = plan_student(recording, 2)
    assert plan.counts == (1, 2) and Student.of(recording, plan).recording is recording


def test_the_proof_fails_with_another_items_control(switched: Recording) -> None:
    wrong = replace(switched)
    items = switched.invocation.item, switched.invocation.other

    def exchanged(asked: Any, seed: int = 0) -> list[Conditioning]:
        return switched.draw_each([items[1] if item == items[0] else items[0] for item in asked], seed)

    object.__setattr__(wrong, "condition_each", lambda items: exchanged(items))
    object.__setattr__(wrong, "draw_each", exchanged)
    with pytest.raises(RecordingError, match="failed its proof"):
        wrong.prove()


@pytest.mark.parametrize(
    ("way", "call", "words"),
    [
        ("changed", {}, "no argument of network is what it answers"),
        ("some", {}, "with a network that is called in some steps only"),
        ("ramp", {"control_end": 0.6}, "does more than switch it on and off"),
        ("", {"control_scale": 0.0}, "answers with nothing but zeros"),
        ("", {"control_start": 0.5, "control_end": 0.4}, "answers with nothing but zeros"),
    ],
)
def test_controls_that_cannot_be_recorded(way: str, call: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordingError) as caught:
        recorded(way, **call)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_control_net_of_diffusers() -> None:
    """Stable Diffusion's, on down to another time at another number of steps."""
    base = tiny_stable_diffusion()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        control = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16)).eval()
        with torch.no_grad():
            for parameter in control.parameters():  # what has just been made answers with zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    parts = {**base.components, "controlnet": control}
    pipeline = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    # Pixels in [0, 1], of the size of the output.
    pictures = [torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    items = [{"prompt": word, "image": picture} for word, picture in zip(("a b", "lower"), pictures, strict=True)]
    recording = record(pipeline, items=items, height=16, width=16, control_guidance_end=0.6, num_inference_steps=25)
    second = recording.recipe.second
    assert second is not None and second.switch is not None and second.switch.argument == "conditioning_scale"
    assert recording.prove().worst() <= 5e-6
    lowest = []
    for count in (25, 4, 2):
        walked = as_walked(recording, pipeline, {}, count).recipe.second
        assert walked is not None and walked.switch is not None
        lowest.append(math.ceil(walked.switch.lowest))
    assert math.ceil(second.switch.lowest) == lowest[0] and lowest == [401, 501, 501]
    shared(recording, as_walked(recording, pipeline, {}, 4), 2)
    with pytest.raises(ExportError, match="never switches its controlnet on in 1 step"):
        as_walked(recording, pipeline, {}, 1)
