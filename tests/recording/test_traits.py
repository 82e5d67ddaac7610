"""Every trait that a pipeline may have, one at a time: recorded and proved, or refused in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from synthetic import TrueGuidancePipeline, synthetic
from torch import nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording import Recording, RecordingError, record
from tests.recording.synthetic_parts import FRAMES, RECORDABLE, SCHEDULERS, Traits


def _name(traits: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in traits.items())


def _recorded(prompt: str = "a cat", scheduler: Any = None, **traits: Any) -> Recording:
    return record(synthetic(Traits(**traits), scheduler), prompt=prompt)


@pytest.mark.parametrize("traits", RECORDABLE, ids=_name)
def test_every_trait_is_recorded_and_proved(traits: dict[str, Any]) -> None:
    proof = _recorded(**traits).prove()
    assert proof.worst() <= 1e-6 and not proof.shaken


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_family_of_schedulers_is_recorded_and_proved(name: str) -> None:
    make, traits = SCHEDULERS[name]
    recording = _recorded(scheduler=make(), **traits)
    assert recording.prove().worst() <= 1e-5
    assert recording.prediction_type == {
        "v": "v_prediction",
        "x0": "sample",
        "edm": "edm",
        "continuous_v": "edm_v",
    }.get(name, "flow" if "flow" in name or "static" in name else "v_prediction" if "snr" in name else "epsilon")


@pytest.mark.parametrize("layout", ["first", "last", "list"])
def test_a_float_time_and_its_gradient_pass_through(layout: str) -> None:
    recording = _recorded(layout=layout, time="truncated")
    x = torch.randn(2, *recording.sample_shape, requires_grad=True)
    timestep = torch.tensor([400.7, 100.2], dtype=torch.float64, requires_grad=True)
    told = recording.condition(["a", "b"])
    answer = recording.recipe.call(recording.network, x, timestep, told, continuous=True)
    by_x, by_time = torch.autograd.grad(answer.square().sum(), [x, timestep])
    assert by_x.abs().min(dim=0).values.max() > 0 and by_time.abs().min() > 0
    rounded = recording.recipe.call(recording.network, x, timestep, told)
    assert torch.equal(rounded, recording.recipe.call(recording.network, x, timestep.floor(), told))


def test_times_that_are_nearly_whole_are_rounded_before_they_are_truncated() -> None:
    rule = _recorded(time="truncated").recipe.times[0]
    assert rule.numbers(torch.tensor([665.9999999, 665.9], dtype=torch.float64)).tolist() == [666, 665]


def test_the_floor_of_a_velocity_is_found() -> None:
    output = _recorded(output="x0").recipe.output
    assert (output.relation, output.scale) == ("velocity", 1000.0)
    assert output.floor == pytest.approx(0.05)


def test_whole_timesteps_beside_shifted_noise_levels_are_refused() -> None:
    """The network's time does not name its noise level, whatever scheduler a student has."""
    with pytest.raises(RecordingError, match=r"gives the network the timestep \d+ at the noise level 0\.\d+"):
        _recorded(own_grid="integers")


def test_a_time_that_no_scheduler_feeds_is_refused() -> None:
    with pytest.raises(RecordingError, match="timestep of network changes between steps, but by no simple rule"):
        _recorded(time="atan")


@pytest.mark.parametrize(("traits", "off", "offset"), [({}, 1.0, 0.0), ({"off": "zero", "plus_one": True}, 0.0, 1.0)])
@pytest.mark.parametrize("given", [3.0, None])
def test_off_value_and_formula(traits: dict[str, Any], off: float, offset: float, given: float | None) -> None:
    call = {"guidance_scale": off if given is None else given}
    report = record(synthetic(Traits(**traits)), prompt="a cat", **call).guidance
    assert report.off_argument == ("guidance_scale", off) and report.offset == offset
    assert report.linear and not report.embedded and report.calls == 1


@pytest.mark.parametrize("call", [{}, {"negative_prompt": "blue"}, {"true_cfg_scale": 1.0}, {"guidance_scale": 7.0}])
def test_embedded_guidance_beside_a_true_one(call: dict[str, Any]) -> None:
    pipeline = TrueGuidancePipeline(**synthetic(Traits()).components)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(pipeline, prompt="a cat", **call)
    report = recording.guidance
    assert report.embedded and recording.embedded == {"ids"} and report.off_argument == ("true_cfg_scale", 1.0)
    wanted = torch.full((1, 1), call.get("guidance_scale", 3.5))
    assert torch.equal(recording.condition(["a dog"]).arguments()["ids"], wanted)
    assert torch.equal(recording.negative().arguments()["ids"], wanted)
    assert recording.prove().worst() <= 1e-6


@pytest.mark.parametrize("guidance", ["batched", "sequential"])
@pytest.mark.parametrize(("negative", "text"), [("zeros", None), ("stock", "blurry"), ("empty", "")])
def test_the_negative_is_the_pipelines_own(guidance: str, negative: str, text: str | None) -> None:
    recording = _recorded(guidance=guidance, negative=negative)
    found = recording.negative().arguments()["text"]
    if text is None:
        assert not found.any()
    else:
        assert torch.allclose(found, recording.pipeline.encode_prompt([text])[0])


def test_a_negative_prompt_in_the_call_is_respected() -> None:
    recording = record(synthetic(Traits()), prompt="a cat", negative_prompt="a dog")
    assert torch.allclose(recording.negative().arguments()["text"], recording.pipeline.encode_prompt(["a dog"])[0])
    assert recording.call == {"negative_prompt": "a dog"}


def test_no_guidance_no_negative() -> None:
    recording = _recorded(guidance="none")
    assert recording.negative() is None and recording.guidance.off_argument is None


def test_ragged_prompts_are_encoded_alone_and_batched_only_when_they_agree() -> None:
    recording = _recorded(text="longest")
    with pytest.raises(RecordingError, match=r"cannot form one batch with 'a cat': 'a longer prompt'.*text is"):
        recording.condition(["a cat", "a dog", "a longer prompt"])
    short, same, long = recording.condition_each(["a cat", "a dog", "a longer prompt"])
    assert Conditioning.compatible(short, same) and not Conditioning.compatible(short, long)
    alone = recording.pipeline.encode_prompt(["a longer prompt"])[0]
    assert torch.equal(long.arguments()["text"], alone)


def test_rows_repeated_per_frame_stay_together() -> None:
    recording = _recorded(text="per_frame")
    one, two = recording.condition_each(["a cat", "a dog"])
    both = Conditioning.cat([one, two])
    assert len(both.arguments()["text"]) == 2 * FRAMES
    assert torch.equal(both.select([1]).arguments()["text"], two.arguments()["text"])


def test_integer_timesteps_of_a_flow_scheduler_are_no_sigmas() -> None:
    recording = _recorded(scheduler=SCHEDULERS["integer_flow"][0]())
    assert recording.recipe.times[0].dtype == "float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_student_of_another_dtype_is_called_too(dtype: torch.dtype) -> None:
    recording = _recorded()
    x, told = torch.randn(2, *recording.sample_shape), recording.condition(["a", "b"])
    timestep = torch.tensor([900.0, 30.0], dtype=torch.float64)
    wanted = recording.recipe.call(recording.network, x, timestep, told)
    answer = recording.recipe.call(recording.network.to(dtype), x, timestep, told.to(dtype=dtype))
    assert answer.dtype == dtype
    assert torch.allclose(answer.float(), wanted, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("time", ["thousandth", "batch"])
def test_a_narrower_network_is_told_the_exact_time(time: str, continuous: bool) -> None:
    """In bfloat16 the timestep 750 is 752, which no stock pipeline would feed."""
    recording = _recorded(time=time)
    told, seen = recording.condition(["a", "b"]), []
    network = recording.network.to(torch.bfloat16)
    handle = network.register_forward_pre_hook(lambda _m, _a, named: seen.append(named["timestep"]), with_kwargs=True)
    timestep = torch.tensor([750.0, 999.0], dtype=torch.float64)
    recording.recipe.call(
        network, torch.randn(2, *recording.sample_shape), timestep, told.to(dtype=torch.bfloat16), continuous=continuous
    )
    handle.remove()
    torch.testing.assert_close(seen[0].double(), timestep / (1000 if time == "thousandth" else 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("time", ["thousandth", "cast", "batch", "truncated"])
def test_a_bfloat16_pipeline_is_proved(time: str) -> None:
    pipeline = synthetic(Traits(time=time))
    for module in (pipeline.network, pipeline.text_encoder, pipeline.projection):
        module.to(torch.bfloat16)
    pipeline.network.time.float()  # a few weights stay in float32, and they come first in some networks
    recording = record(pipeline, prompt="a cat")
    assert recording.dtype == torch.bfloat16 and recording.recipe.network_dtype == "bfloat16"
    assert 1e-6 < recording.prove().worst() <= 2e-2


def test_a_wrong_recipe_does_not_pass() -> None:
    """Each mistake that recorders are known to make must show in the proof."""
    recording = _recorded(time="thousandth", output="half_negated")
    right = recording.recipe
    wrong_time = replace(right.times[0], operations=())
    for wrong in (
        replace(right, times=(wrong_time,)),
        replace(right, output=replace(right.output, relation="same")),
        replace(right, times=(replace(right.times[0], operations=(("div", 1000.0), ("rsub", 1.0))),)),
    ):
        other = replace(recording, recipe=wrong)
        with pytest.raises(RecordingError, match=r"failed its proof: .* differs by [0-9.e-]+ relative"):
            other.prove()


def test_a_network_that_ignores_the_prompt_is_named() -> None:
    pipeline = synthetic(Traits())
    nn.init.zeros_(pipeline.network.text.to_out.weight)
    recording = record(pipeline, prompt="a cat")
    before = {name: value.clone() for name, value in pipeline.network.state_dict().items()}
    with pytest.warns(UserWarning, match="does not change with the prompt.*repeated on shaken weights"):
        proof = recording.prove()
    assert proof.shaken and any("shaken weights, unguided" in check.name for check in proof.checks)
    assert all(torch.equal(before[name], value) for name, value in pipeline.network.state_dict().items())


def test_zero_output_layers_do_not_hide_the_sign() -> None:
    pipeline = synthetic(Traits(output="half_negated"))
    nn.init.zeros_(pipeline.network.leave.weight)
    nn.init.zeros_(pipeline.network.leave.bias)
    recording = record(pipeline, prompt="a cat")
    assert recording.recipe.output.relation == "negated" and recording.recipe.output.half_axis == 1
    with pytest.warns(UserWarning, match="the sample or the time or the prompt"):
        assert recording.prove().shaken
