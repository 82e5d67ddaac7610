"""What is kept of a run under observation, and what is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_stable_diffusion
from torch import Tensor
from transformers import CLIPTextModel

from fewstep.recording.loop.long_run import LONG, live_steps, long_count
from fewstep.recording.watch.observation import NetworkCall, Observation, Step, Stub
from fewstep.recording.watch.observe import observe


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for child in value.values():
            yield from tensors(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from tensors(child)


def held(seen: Observation) -> int:
    """Bytes of the tensors that an observation holds."""
    calls = [call for step in seen.steps for call in step.calls]
    found = [*tensors([vars(step) for step in seen.steps]), *tensors([[c.arguments, c.output] for c in calls])]
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in found}.values())


def pipeline_of(layers: int) -> Any:
    """Whose text encoder answers with the hidden states of so many layers."""
    pipeline = tiny_stable_diffusion()
    config = pipeline.text_encoder.config
    config.num_hidden_layers, config.output_hidden_states = layers, True
    pipeline.text_encoder = CLIPTextModel(config).eval()
    return pipeline


CALL = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.mark.parametrize("how", [{"steps": 2}, {"steps": 1, "loop": ("unet",)}], ids=["unknown", "known"])
def test_what_is_kept_of_a_run_does_not_grow_with_the_layers_of_an_encoder(how: dict[str, Any]) -> None:
    sizes = []
    for layers in (2, 6):
        seen = observe(pipeline_of(layers), dict(CALL), **how)
        first = seen.steps[0].calls
        assert [call.component for call in first] == ["text_encoder", "unet"]
        assert first[0].output is None and first[0].finite and first[1].output is not None
        sizes.append(held(seen))
    assert sizes[0] == sizes[1]


def test_what_stands_still_from_step_to_step_is_kept_once() -> None:
    pipeline = tiny_stable_diffusion()
    output = observe(pipeline, dict(CALL), steps=1).steps[0].calls[-1].output
    first, *others = observe(pipeline, dict(CALL), stub=Stub(("unet",), output), steps=4).steps
    for step in others:
        assert step.model_output is first.model_output and step.calls[-1].output is first.calls[-1].output
    assert others[0].sample is first.result, "the next sample"


def test_an_observation_goes_with_its_last_name() -> None:
    seen = observe(tiny_stable_diffusion(), dict(CALL), steps=2)
    sample = weakref.ref(seen.steps[0].sample)
    gc.collect()
    gc.disable()  # which would also free what is held in a circle, much later
    try:
        del seen
        assert sample() is None
    finally:
        gc.enable()


def test_what_one_network_answers_and_another_is_told_is_kept_once() -> None:
    first, network = observe(pipeline_of(2), dict(CALL), steps=1).steps[0].calls
    told = network.arguments["encoder_hidden_states"]
    assert any(told is one for one in tensors(dict(first.output)))


def test_of_large_samples_the_long_run_makes_fewer_steps() -> None:
    def short(entries: int) -> list[Step]:
        x = [torch.full((1,), float(number)).expand(1, entries) for number in range(2)]
        return [Step([NetworkCall("unet", {"x": one})], one, 1.0, False, one, None) for one in x]

    assert long_count(short(100)) == LONG
    assert long_count(short(4_000_000)) == 10**9 // (2 * 4 * 4_000_000) == 31
    assert long_count(short(20_000_000)) == 21
    assert live_steps(31) == {0, 15, 29, 30}
