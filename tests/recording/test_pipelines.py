"""Recording stock pipelines: the tiny ones of these tests, and every one in the folder that --zoo names."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from tiny_pipelines import TINY
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording import Recipe, Recording, record
from fewstep.recording.proof.proof import relative_error
from fewstep.recording.watch.shake import shaken

SHAKES = pytest.mark.parametrize("shake", [False, True], ids=["as-is", "shaken"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", pipeline_folder.names(metafunc.config, sample=False))


def denoisers(pipeline: Any) -> list[nn.Module]:
    parts = (pipeline.components.get(name) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if part is not None]


def recorded_and_proved(pipeline: Any, call: dict[str, Any], shake: bool) -> Recording:
    """Record and prove; shaken weights must need no further shaking."""
    with shaken(*denoisers(pipeline), seed=5) if shake else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = record(pipeline, **call)
        proof = recording.prove()
        assert all(check.holds for check in proof.checks)
        assert "failed" not in recording.summary() and recording.component in recording.summary()
        assert_called_alike(recording)
    return recording


def assert_called_alike(recording: Recording) -> None:
    """Another network of the class, through a recipe that went through JSON, gives the same, with gradients."""
    told = recording.condition_each(
        *[["a b", "lower"]] if recording.conditional == "prompt" else [], **_labels(recording)
    )
    x = torch.randn(1, *recording.sample_shape, requires_grad=True)
    timestep = recording.schedule.timestep(torch.tensor([0.6], dtype=torch.float64))
    recipe = Recipe.from_json(recording.recipe.to_json())
    assert recipe == recording.recipe
    student = copy.deepcopy(recording.network)
    answer = recipe.call(student, x, timestep, told[0])
    assert answer.shape == x.shape
    own = recording.recipe.call(recording.network, x, timestep, told[0])
    assert relative_error(answer, own) < 1e-5
    if answer.abs().max() > 0:
        parameters = [p for p in student.parameters() if p.requires_grad]
        by_x, *by_weights = torch.autograd.grad(answer.square().sum(), [x, *parameters], allow_unused=True)
        assert by_x.abs().max() > 0 and any(g is not None and g.abs().max() > 0 for g in by_weights)


def _labels(recording: Recording) -> dict[str, Any]:
    return {"labels": [1, 0]} if recording.conditional == "label" else {}


def direct(recording: Recording, images: Tensor) -> Tensor:
    """Images through the autoencoder alone and back, past the pipeline."""
    vae = recording.pipeline.vae
    pixels = images * 2 - 1
    if recording.codec.shape[1:-2] == (1,) and pixels.dim() == 4:
        pixels = pixels.unsqueeze(2)
    with torch.no_grad():
        encoded = vae.encode(pixels)
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        back = vae.decode(z, return_dict=False)[0]
    back = back.squeeze(2) if images.dim() == 4 and back.dim() == 5 else back
    return (back / 2 + 0.5).clamp(0, 1)


def assert_encodes(recording: Recording) -> None:
    images = recording.decode(torch.randn(2, *recording.sample_shape))
    assert images.min() >= 0 and images.max() <= 1
    x0 = recording.encode(images)
    assert x0.shape == (2, *recording.sample_shape)
    wanted = direct(recording, images) if recording.codec.decoder else images
    assert torch.allclose(recording.decode(x0), wanted, atol=1e-3)


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    build, call = TINY[request.param]
    return request.param, build(), call


@SHAKES
def test_tiny_pipelines(tiny: tuple[str, Any, dict[str, Any]], shake: bool) -> None:
    _name, pipeline, call = tiny
    recorded_and_proved(pipeline, call, shake)


def test_tiny_pipelines_in_bfloat16(tiny: tuple[str, Any, dict[str, Any]]) -> None:
    _name, pipeline, call = tiny
    recording = record(pipeline.to(torch.bfloat16), **call)
    assert 1e-5 < recording.prove().worst() <= 2e-2 and recording.dtype == torch.bfloat16
    images = recording.decode(recording.encode(recording.decode(torch.randn(1, *recording.sample_shape))))
    assert images.isfinite().all()


class _CastsItsDecoder(StableDiffusionPipeline):
    """Decodes in float32, as pipelines do whose autoencoder overflows in half precision."""

    def __call__(self, prompt: str | list[str], num_inference_steps: int = 50, output_type: str = "pil") -> Any:
        def cast(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            self.vae.float()
            return {}

        kwargs = {"num_inference_steps": num_inference_steps, "output_type": output_type, "guidance_scale": 1.0}
        result = super().__call__(prompt, callback_on_step_end=cast, **kwargs)
        self.vae.half()
        return result


def test_a_decoder_that_is_cast_for_the_decode_is_cast_back() -> None:
    build, call = TINY["stable_diffusion"]
    pipeline = _CastsItsDecoder(**build().components, requires_safety_checker=False)
    pipeline.vae.half()
    recording = record(pipeline, **call)
    assert recording.codec.decoder == "vae"
    assert all(p.dtype == torch.float16 for p in pipeline.vae.parameters())


def test_tiny_images_go_in_and_out(tiny: tuple[str, Any, dict[str, Any]]) -> None:
    _name, pipeline, call = tiny
    assert_encodes(record(pipeline, **call))


def test_zoo(zoo: Path, zoo_name: str) -> None:
    """As they are and with shaken weights; one test, because loading takes longer than recording."""
    pipeline = DiffusionPipeline.from_pretrained(zoo / zoo_name, local_files_only=True)
    call = pipeline_folder.call_of(zoo, zoo_name, pipeline)
    assert_encodes(recorded_and_proved(pipeline, call, shake=False))
    recorded_and_proved(pipeline, call, shake=True)


def test_the_pipeline_is_left_as_found(tiny: tuple[str, Any, dict[str, Any]]) -> None:
    _name, pipeline, call = tiny
    network = nn.ModuleList(denoisers(pipeline))
    network.train()
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    attributes, config = dict(pipeline.__dict__), dict(pipeline.config)
    scheduler, state = pipeline.scheduler, copy.deepcopy(pipeline.scheduler.__dict__)
    random_state, given = torch.get_rng_state(), copy.deepcopy(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = record(pipeline, **call)
        recording.prove()
        recording.codec  # noqa: B018 (reading it runs the pipeline)
    assert pipeline.__dict__ == attributes and dict(pipeline.config) == config and call == given
    assert pipeline.scheduler is scheduler and scheduler.__dict__.keys() == state.keys() and "step" not in state
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert network.training and all(module.training for module in network.modules())
    for module in network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in module.__dict__
    assert torch.equal(torch.get_rng_state(), random_state)


def test_conditioning_runs_the_text_encoders_only() -> None:
    build, call = TINY["stable_diffusion"]
    recording = record(build(), **call)
    runs: list[str] = []
    for name in ("unet", "vae", "text_encoder"):
        module = recording.pipeline.components[name]
        module.register_forward_hook(lambda *_args, name=name: runs.append(name))
    told = recording.condition(["the cat", "a dog", ""])
    assert runs == ["text_encoder"] * 3 and told.batch_size == 3


def test_each_prompt_is_what_the_pipeline_itself_encodes() -> None:
    build, call = TINY["stable_diffusion"]
    recording = record(build(), **call)
    wanted = recording.pipeline.encode_prompt("a dog", "cpu", 1, False)[0]
    assert torch.equal(recording.condition(["a dog"]).arguments()["encoder_hidden_states"], wanted)
    empty = recording.pipeline.encode_prompt("", "cpu", 1, False)[0]
    assert torch.allclose(recording.negative().arguments()["encoder_hidden_states"], empty, atol=1e-6)
    assert Conditioning.compatible(recording.negative(), recording.condition(["a dog"]))


def test_labels_and_the_null_class() -> None:
    build, call = TINY["dit"]
    recording = record(build(), **call)
    assert recording.conditional == "label" and recording.call == {}
    assert recording.condition(labels=[3, 5]).arguments()["class_labels"].tolist() == [3, 5]
    assert recording.negative().arguments()["class_labels"].tolist() == [1000]


@pytest.mark.parametrize(("name", "scale"), [("stable_diffusion", 1.0), ("edm", (80.0**2 + 1) ** 0.5 / 80.0)])
def test_initial_noise_scale(name: str, scale: float) -> None:
    build, call = TINY[name]
    assert record(build(), **call).initial_noise_scale == pytest.approx(scale, rel=1e-4)


def test_a_gpu_pipeline_is_proved() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for build, call in TINY.values():
        pipeline = build().to("cuda")
        recording = recorded_and_proved(pipeline, call, shake=False)
        assert recording.proof.worst() <= 1e-3
