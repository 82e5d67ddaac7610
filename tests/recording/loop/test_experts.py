"""Several networks that share a loop by time: found, told apart to the last number, proved each, or refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from synthetic import ExpertPipeline, synthetic, synthetic_experts
from tiny_pipelines import WAN_CALL, tiny_wan
from torch import nn

from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.loop.experts import expert_at
from fewstep.recording.watch.shake import shaken
from tests.recording.synthetic_parts import Traits
from tests.recording.test_refusals import refused

COMPONENTS = ("network", "middle", "low")


def recorded(scheduler: Any = None, call: dict[str, Any] | None = None, **traits: Any) -> Recording:
    return record(synthetic_experts(Traits(**traits), scheduler), prompt="a cat", **call or {})


def below(number: float) -> float:
    return torch.nextafter(torch.tensor(number), torch.tensor(0.0)).item()


@pytest.mark.parametrize(
    "traits",
    [{}, {"guidance": "sequential", "positive_first": True}, {"layout": "list", "output": "half_negated"}],
    ids=str,
)
def test_three_experts_are_found_and_proved(traits: dict[str, Any]) -> None:
    recording = recorded(**traits)
    assert recording.components == COMPONENTS and recording.component == "network"
    assert [e.network for e in recording.experts] == [getattr(recording.pipeline, name) for name in COMPONENTS]
    assert recording.prove().worst() <= 1e-6 and not recording.proof.shaken


@pytest.mark.parametrize(
    "scheduler",
    [None, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)],
    ids=["floats", "integers"],
)
def test_the_bounds_are_the_pipelines_own_to_the_last_number(scheduler: Any) -> None:
    """Also where the teacher's scheduler rounds its timesteps: a student's may not."""
    recording = recorded(scheduler)
    first, second, last = recording.experts
    assert (first.lowest, last.lowest) == (torch.tensor(ExpertPipeline.FIRST).item(), -math.inf)
    assert below(second.lowest) == ExpertPipeline.ABOVE_SECOND  # the second is called above it, not at it
    for lowest in (first.lowest, second.lowest):
        for number in (lowest, below(lowest)):
            own = recording.pipeline.expert(torch.tensor(number))
            assert expert_at(recording.experts, number) is recording.experts[own]
    assert recording.intervals.lowest == (first.lowest / 1000, second.lowest / 1000, 0.0)


def test_the_bounds_of_a_table_are_integers() -> None:
    recording = recorded(DDIMScheduler(clip_sample=False))
    assert [e.lowest for e in recording.experts] == [651, 201, -math.inf]


@pytest.mark.parametrize(
    ("call", "scales"),
    [
        ({}, (3.0, 3.0, 3.0)),
        ({"guidance_scale": 4.0, "guidance_scale_2": 2.0, "guidance_scale_3": 1.25}, (4.0, 2.0, 1.25)),
        ({"guidance_scale_3": 1.0}, (3.0, 3.0, 1.0)),
        ({"guidance_scale": 1.0, "guidance_scale_2": 2.0}, (1.0, 1.0, 1.0)),
    ],
)
def test_each_has_the_guidance_that_the_call_gives_it(call: dict[str, float], scales: tuple[float, ...]) -> None:
    recording = recorded(call=call)
    assert recording.guidance.expert_scales == scales
    assert recording.prove().worst() <= 1e-6


def test_every_expert_counts_in_the_proof() -> None:
    recording = recorded()
    high, middle, low = recording.experts
    for wrong in (
        (high, replace(middle, network=low.network), low),
        (replace(high, network=middle.network), replace(middle, network=high.network), low),
    ):
        other = replace(recording, experts=wrong)
        with pytest.raises(RecordingError, match="failed its proof"):
            other.prove()


def test_stock_two_experts() -> None:
    pipeline = tiny_wan()
    with shaken(pipeline.transformer, pipeline.transformer_2):
        recording = record(pipeline, prompt="the cat", guidance_scale=4.0, guidance_scale_2=3.0, **WAN_CALL)
        assert recording.prove().worst() <= 1e-6 and not recording.proof.shaken
    assert [(e.component, e.lowest) for e in recording.experts] == [
        ("transformer", 875.0),
        ("transformer_2", -math.inf),
    ]
    assert recording.guidance.expert_scales == (4.0, 3.0)
    assert "transformer (WanTransformer3DModel, float32) from timestep 875 up" in recording.summary()
    codec = recording.codec
    assert codec.decoder == "vae" and codec.decode(torch.zeros(1, *recording.sample_shape)).shape == (1, 3, 9, 16, 16)
    alone = recording.of(recording.experts[1])
    assert alone.components == ("transformer_2",) and alone.recipe.component == "transformer_2"


def test_stock_experts_in_half_precision_are_left_as_found() -> None:
    pipeline = tiny_wan().to(torch.bfloat16)
    networks = nn.ModuleList([pipeline.transformer, pipeline.transformer_2]).train()
    attributes, state = dict(pipeline.__dict__), {name: value.clone() for name, value in networks.state_dict().items()}
    recording = record(pipeline, prompt="the cat", guidance_scale_2=2.5, **WAN_CALL)
    assert recording.guidance.expert_scales == (5.0, 2.5) and recording.experts[0].lowest == 875.0
    assert pipeline.__dict__ == attributes and all(module.training for module in networks.modules())
    assert all(torch.equal(state[name], value) for name, value in networks.state_dict().items())
    for module in networks.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__


def test_a_second_network_that_is_never_called_is_none() -> None:
    pipeline = tiny_wan()
    pipeline.register_to_config(boundary_ratio=None)
    assert record(pipeline, prompt="the cat", **WAN_CALL).components == ("transformer",)


class _ByCount(ExpertPipeline):
    """The first three steps go to one network, whatever their times."""

    steps = 0

    def expert(self, t: Any) -> int:
        self.steps += 1
        return 0 if self.steps <= 3 else 1


class _InTurns(_ByCount):
    """Every step goes to another network."""

    def expert(self, t: Any) -> int:
        super().expert(t)
        return self.steps % 2


class _Returning(ExpertPipeline):
    """The first network comes back."""

    def expert(self, t: Any) -> int:
        return 1 if 300 < t < 600 else 0


@pytest.mark.parametrize("kind", [_ByCount, _InTurns, _Returning])
def test_networks_that_are_not_split_by_time(kind: type[ExpertPipeline]) -> None:
    pipeline = synthetic_experts(Traits(guidance="none"), kind=kind)
    refused(
        pipeline,
        "calls (network, middle|middle, network), and which one does not follow from the time alone",
        prompt="a cat",
    )


class _Together(ExpertPipeline):
    """Both networks are called in every step, and their answers averaged."""

    def expert(self, t: Any) -> int:
        return 0

    def _ask(self, *told: Any) -> Any:
        answer = super()._ask(*told)
        networks = self.__dict__
        first = networks["network"]
        networks["network"] = networks["middle"]
        try:
            return (answer + super()._ask(*told)) / 2
        finally:
            networks["network"] = first


class _OtherTime(ExpertPipeline):
    """One of the networks counts its time otherwise."""

    def _ask(self, x: Any, t: Any, *rest: Any) -> Any:
        return super()._ask(x, t + 1 if self.expert(t) == 2 else t, *rest)


class _OtherWords(ExpertPipeline):
    """One of the networks is told other words."""

    def _ask(self, x: Any, t: Any, following: Any, text: Any, mask: Any) -> Any:
        return super()._ask(x, t, following, text * 2 if self.expert(t) == 1 else text, mask)


class _OtherNegative(ExpertPipeline):
    """One of the networks is guided away from something else."""

    def _ask(self, x: Any, t: Any, following: Any, text: Any, mask: Any) -> Any:
        if self.expert(t) == 1 and len(text) > 1:
            text = torch.cat([text[:1] * 2, text[1:]])
        return super()._ask(x, t, following, text, mask)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_Together, "calls network beside middle"),
        (_OtherTime, "share the loop by time, but not one recipe calls them all: .* by no simple rule"),
        (_OtherWords, "not one recipe calls them all: the argument text of network changes"),
        (_OtherNegative, "in a guided step _OtherNegative tells middle something else than network"),
    ],
)
def test_networks_that_are_called_in_different_ways(kind: type[ExpertPipeline], words: str) -> None:
    refused(synthetic_experts(Traits(), kind=kind), words, prompt="a cat")


def test_an_answer_that_only_one_network_gives_in_another_form() -> None:
    pipeline = synthetic_experts(Traits(), third=Traits(output="half_negated"))
    refused(pipeline, "failed under the recorder|not one recipe", prompt="a cat")


def test_a_sum_that_is_not_linear_has_no_scale_to_read_off() -> None:
    refused(synthetic_experts(Traits(linear=False)), "guided sum of ExpertPipeline at .* is not linear", prompt="a cat")


def test_an_interval_too_narrow_to_prove() -> None:
    class Narrow(ExpertPipeline):
        FIRST, ABOVE_SECOND = 650.3, 649.0

    pipeline = synthetic_experts(Traits(), FlowMatchEulerDiscreteScheduler(shift=8.0), Narrow)
    refused(pipeline, "calls middle fewer than 3 times in 513 steps|does not call exactly one of", prompt="a cat")


def test_one_network_pays_nothing() -> None:
    recording = record(synthetic(Traits()), prompt="a cat")
    assert recording.visits is None and recording.guidance.expert_scales == ()
    assert [(e.component, e.lowest) for e in recording.experts] == [("network", -math.inf)]
