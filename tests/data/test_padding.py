"""Ragged prompts of every kind: in training each is answered as its pipeline answers it alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import RaggedConditioning
from fewstep.data.conditions import Conditions
from fewstep.data.padding import Padding, find_padding
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recording, record
from fewstep.recording.watch.observe import observe
from fewstep.recording.watch.shake import shaken
from tests.recording.synthetic import TraitPipeline, synthetic, synthetic_experts
from tests.recording.synthetic_parts import Denoiser, Traits

PROMPTS = ["a cat", "b", "a dog", "a much longer prompt"]


def recorded(**traits: Any) -> Recording:
    return record(synthetic(Traits(**traits)), prompt="a cat")


def assert_answered_as_alone(recording: Recording, conditions: Conditions, prompts: list[str]) -> None:
    """One training-time call for all prompts against the pipeline's own, each prompt alone."""
    steps = []
    for prompt in prompts:
        call = recording.invocation.arguments([prompt], 3, **recording.off)
        steps.append(observe(recording.pipeline, call, steps=2).steps[1])
    timestep = torch.tensor([step.timestep for step in steps], dtype=torch.float64)
    t = recording.schedule.time(timestep)
    x = torch.cat([step.network_input for step in steps])
    scale = recording.schedule.input_scale(t).view(-1, *[1] * (x.dim() - 1))
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)
    with torch.no_grad():
        got = denoiser.raw((x / scale).to(x), t, conditions.select(range(len(prompts))))
    wanted = torch.cat([step.model_output for step in steps])
    torch.testing.assert_close(got, wanted.to(got), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("layout", ["first", "list"])
@pytest.mark.parametrize(
    ("text", "masks", "groups"),
    [
        ("fixed", None, 1),
        ("longest", None, 3),
        ("mask_when_ragged", {"mask": torch.float32}, 1),
        ("single_trimmed", {"mask": torch.float32}, 1),
        ("ragged_list", None, 1),
        ("per_frame", None, 1),
    ],
)
def test_training_answers_each_prompt_as_the_pipeline_does_alone(
    text: str, layout: str, masks: dict[str, torch.dtype] | None, groups: int
) -> None:
    recording = recorded(text=text, layout=layout)
    conditions = Conditions(recording, prompts=PROMPTS)
    batch = conditions.select(range(4))
    assert conditions.padding == (None if masks is None else Padding(masks))
    assert (len(batch.groups) if isinstance(batch, RaggedConditioning) else 1) == groups
    assert_answered_as_alone(recording, conditions, PROMPTS)


class _Deaf(Denoiser):
    """It is given a mask, and pays no attention to it."""

    def forward(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> tuple[Any]:
        return super().forward(*args, **kwargs)


def test_a_mask_that_does_not_work_is_found_out() -> None:
    whole = synthetic(Traits(text="single_trimmed"))
    network = _Deaf(whole.traits)
    network.load_state_dict(whole.network.state_dict())
    pipeline = TraitPipeline(network, whole.text_encoder, whole.projection, whole.scheduler)
    recording = record(pipeline, prompt="a cat")
    conditions = Conditions(recording, prompts=PROMPTS)
    assert conditions.padding is None and len(conditions.select(range(4)).groups) == 3
    assert_answered_as_alone(recording, conditions, PROMPTS)


def test_the_mask_has_to_work_in_every_expert() -> None:
    """Networks that share the time are padded alike, so one that pays no attention to the mask decides."""
    traits = Traits(text="single_trimmed")
    found = []
    for low in (Denoiser, _Deaf):
        pipeline = synthetic_experts(traits)
        network = low(traits)
        network.load_state_dict(pipeline.low.state_dict())
        pipeline.register_modules(low=network)
        recording = record(pipeline, prompt="a cat")
        assert len(recording.experts) == 3
        items = {prompt: recording.condition_each(prompts=[prompt])[0] for prompt in PROMPTS}
        found.append(find_padding(recording, items))
    assert found[0] is not None and found[1] is None


def test_a_network_that_does_not_hear_the_text_proves_nothing() -> None:
    """Where even unmasked noise changes nothing, on shaken weights too, agreement means nothing."""
    recording = recorded(text="single_trimmed")
    items = {prompt: recording.condition_each(prompts=[prompt])[0] for prompt in PROMPTS}
    assert find_padding(recording, items) is not None
    hears = recording.network.forward

    def forward(hidden_states: Any, timestep: Any, text: Any, **kwargs: Any) -> Any:
        return hears(hidden_states, timestep, text * 0, **kwargs)

    recording.network.forward = forward
    assert find_padding(recording, items) is None


def test_none_becomes_a_full_mask_beside_a_neighbour_that_has_one() -> None:
    """Lengths agree: the text is filled up always, and the mask is None where nothing was."""
    recording = recorded(text="mask_when_ragged")
    long, short = (recording.condition_each(prompts=[p])[0] for p in ("a long one", "a cat"))
    fill = torch.zeros(1, 5, 8)
    masked = Conditioning(
        {
            **short.tree,
            "text": Leaf(torch.cat([short.tree["text"].value, fill], 1), 1),
            "mask": Leaf(torch.tensor([[1.0] * 5 + [0.0] * 5]), 1),
        },
        1,
    )
    padding = find_padding(recording, {"a long one": long, "a cat": masked})
    assert padding == Padding({"mask": torch.float32})
    full, kept = padding.padded([long, masked])
    assert torch.equal(full.arguments()["mask"], torch.ones(1, 10))
    assert torch.equal(kept.arguments()["mask"], masked.arguments()["mask"])
    assert Conditioning.compatible(full, kept)


def test_gradients_flow_to_every_sample_of_a_padded_batch() -> None:
    recording = recorded(text="mask_when_ragged")
    batch = Conditions(recording, prompts=PROMPTS).select(range(4))
    x = torch.randn(4, *recording.sample_shape, requires_grad=True)
    t = torch.full((4,), 500.0, dtype=torch.float64)
    recording.recipe.call(recording.network, x, t, batch).sum().backward()
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", ["QwenImage", "ZImage", "Lumina2"])
def test_zoo_prompts_of_several_lengths(zoo: Path, name: str) -> None:
    call = json.loads((zoo / "manifest.json").read_text())[name]["call"]
    pipeline = DiffusionPipeline.from_pretrained(zoo / name, local_files_only=True)
    prompts = ["a", "a b lower", "lower newer a b lower e r"]
    with shaken(pipeline.transformer), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = record(pipeline, **call)
        conditions = Conditions(recording, prompts=prompts)
        assert isinstance(conditions.select([0, 1, 2]), Conditioning)
        assert (conditions.padding is not None) == (name == "QwenImage")
        assert_answered_as_alone(recording, conditions, prompts)
