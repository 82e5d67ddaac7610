"""Telling a network its guidance: what stock pipelines tell theirs, room made in a UNet, and who cannot be told."""

import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

from fewstep.conditioning.conditioning import Conditioning
from fewstep.errors import UserError
from fewstep.networks.guidance_embedding import find_guidance_embedding, with_guidance_embedding
from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([999.0, 200.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def plain() -> Recording:
    return record(tiny_pipelines.tiny_stable_diffusion())


def answer(recording: Recording, conditioning: Conditioning) -> torch.Tensor:
    with torch.no_grad():
        return recording.recipe.call(recording.network, X, T, conditioning)


def test_a_network_with_new_room_is_the_old_one_whatever_it_is_told(plain: Recording):
    roomy = with_guidance_embedding(plain, 7.5, trained=True)
    told = find_guidance_embedding(roomy, heeded=False)
    before = answer(plain, plain.condition(prompts=["a cat", "b"]))
    conditioning = roomy.condition(prompts=["a cat", "b"])
    for scales in ([7.5, 7.5], [1.0, 12.0]):
        torch.testing.assert_close(answer(roomy, told.tell(conditioning, torch.tensor(scales))), before)
    assert plain.network.config.time_cond_proj_dim is None


def test_a_network_is_told_what_its_stock_pipeline_tells_it(plain: Recording):
    roomy = with_guidance_embedding(plain, 7.5, trained=True)
    told = find_guidance_embedding(roomy, heeded=False)
    assert (told.argument, told.default) == ("timestep_cond", 7.5)
    assert roomy.call["guidance_scale"] == 7.5
    other = record(roomy.pipeline, guidance_scale=11.0)
    ours = told.tell(roomy.condition(prompts=["b"]), torch.tensor([11.0])).arguments()["timestep_cond"]
    torch.testing.assert_close(ours, other.condition(prompts=["b"]).arguments()["timestep_cond"], rtol=0, atol=2e-3)


def test_each_sample_is_told_its_own(plain: Recording):
    roomy = with_guidance_embedding(plain, 7.5, trained=True)
    told, conditioning = find_guidance_embedding(roomy, heeded=False), roomy.condition(prompts=["b", "b"])
    with shaken(roomy.network):
        same = answer(roomy, told.tell(conditioning, torch.tensor([3.0, 9.0])))
        swapped = answer(roomy, told.tell(conditioning, torch.tensor([9.0, 9.0])))
    assert torch.equal(same[1], swapped[1])
    assert not torch.allclose(same[0], swapped[0])


@pytest.mark.parametrize("maker", [tiny_pipelines.tiny_dit, tiny_pipelines.tiny_flow])
def test_a_network_without_room_is_refused(maker):
    with pytest.raises(UserError, match="has no guidance embedding"):
        with_guidance_embedding(record(maker()), 4.0, trained=True)


def test_room_that_no_lora_would_hold_is_refused(plain: Recording):
    with pytest.raises(UserError, match="no LoRA holds"):
        with_guidance_embedding(plain, 7.5, trained=False)


@pytest.mark.parametrize(("family", "factor"), [("Flux", 1), ("HunyuanVideo", 1000)])
def test_a_guidance_distilled_network_is_told_the_scale_or_a_thousand_times_it(zoo: Path, family: str, factor: int):
    pipeline = DiffusionPipeline.from_pretrained(zoo / family)
    if family == "Flux":  # the one in the folder is of the kind that is told nothing
        network = pipeline.transformer
        config = {key: value for key, value in network.config.items() if not key.startswith("_")}
        pipeline.register_modules(transformer=type(network).from_config(config | {"guidance_embeds": True}).eval())
    call = json.loads((zoo / "manifest.json").read_text())[family]["call"]
    recording = record(pipeline, **{**call, "guidance_scale": 2.5})
    assert with_guidance_embedding(recording, 1.0, trained=False) is recording
    told = find_guidance_embedding(recording, heeded=True)
    assert (told.argument, told.default) == ("guidance", 2.5)
    conditioning = told.tell(recording.condition(prompts=["a b", "b a"]), torch.tensor([1.5, 4.0]))
    assert conditioning.arguments()["guidance"].tolist() == [1.5 * factor, 4.0 * factor]
