"""What cannot be recorded is refused in one line that says what was seen and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMInverseScheduler,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    SCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    TCDScheduler,
)
from synthetic import TraitPipeline, synthetic
from tiny_pipelines import tiny_ddim, tiny_dit, tiny_stable_diffusion
from torch import nn

from fewstep.export import load
from fewstep.recording import RecordingError, record
from tests.recording.synthetic_parts import Traits


def refused(pipeline: Any, words: str, **call: Any) -> str:
    """The message with which recording `pipeline` is refused: one line that holds `words`."""
    with pytest.raises(RecordingError, match=words) as caught:
        record(pipeline, **call)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _parts(pipeline: Any, **more: Any) -> dict[str, Any]:
    return {**pipeline.components, "requires_safety_checker": False, **more}


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_that_need_an_image(kind: type) -> None:
    refused(kind(**_parts(tiny_stable_diffusion())), "comes with items", prompt="the cat")


def test_pipelines_that_are_given_an_image() -> None:
    pipeline = StableDiffusionImg2ImgPipeline(**_parts(tiny_stable_diffusion()))
    refused(
        pipeline, "was given image: a picture, a mask or a video", prompt="the cat", image=torch.zeros(1, 3, 16, 16)
    )


def test_control_networks() -> None:
    pipeline = tiny_stable_diffusion()
    control = ControlNetModel.from_unet(pipeline.unet)
    pipeline = StableDiffusionControlNetPipeline(**_parts(pipeline, controlnet=control))
    refused(pipeline, "for want of image: a picture, a mask or a video", prompt="the cat")


def test_further_guidance() -> None:
    pipeline = StableDiffusionPAGPipeline(**_parts(tiny_stable_diffusion()), pag_applied_layers=["mid"])
    refused(pipeline, "more than one answer per step|answers per sample", prompt="the cat")


@pytest.mark.parametrize("value", ["a", True, [3.0]])
def test_a_guidance_that_is_no_number(value: Any) -> None:
    """Else the pipeline fails guided, runs unguided, and the student would be trained without guidance."""
    refused(tiny_stable_diffusion(), "guidance_scale of StableDiffusionPipeline is a number", guidance_scale=value)


def test_a_guidance_of_none_is_the_pipelines_own() -> None:
    assert record(tiny_stable_diffusion(), guidance_scale=None).guidance.argument_scale == 7.5


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_schedulers_of_few_step_students(kind: type) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = kind()
    refused(pipeline, f"with {kind.__name__} is a few-step student already; record its teacher", prompt="the cat")


@pytest.mark.parametrize("kind", [FlowMatchLCMScheduler, FlowMapEulerDiscreteScheduler, SCMScheduler])
def test_schedulers_of_few_step_flow_students(kind: type) -> None:
    refused(synthetic(Traits(), kind()), f"with {kind.__name__} is a few-step student already", prompt="a cat")


def test_students_of_fewstep_itself(tmp_path: Path) -> None:
    """A table student with an ODE walk has a DDIM scheduler, as its teacher may have."""
    tiny_ddim().save_pretrained(tmp_path)
    about = {"call": {"num_inference_steps": 2}, "base_model": "example/teacher"}
    (tmp_path / "fewstep.json").write_text(json.dumps(about))
    refused(load(tmp_path), r"\(distilled by fewstep from example/teacher\) is a few-step student already")
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    refused(stock, "holds a fewstep.json\\) is a few-step student already")


def test_pipelines_that_say_they_make_few_steps() -> None:
    class Sprint(TraitPipeline):
        def __call__(self, prompt: str, num_inference_steps: int = 2) -> Any:
            return super().__call__(prompt, num_inference_steps=num_inference_steps)

    parts = synthetic(Traits(guidance="none")).components
    refused(Sprint(**parts), r"Sprint \(2 steps by default\) is a few-step student already", prompt="a cat")

    class Marked(TraitPipeline):
        def __init__(self, network: Any, text_encoder: Any, projection: Any, scheduler: Any, is_distilled: bool = True):
            super().__init__(network, text_encoder, projection, scheduler)
            self.register_to_config(is_distilled=is_distilled)

    refused(Marked(**parts), r"\(is_distilled in its model_index.json\) is a few-step student", prompt="a cat")


def test_a_fixed_list_of_steps() -> None:
    class Fixed(TraitPipeline):
        def _set_timesteps(self, count: int) -> None:
            self.scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.7, 0.4])

    refused(Fixed(**synthetic(Traits()).components), "makes 4 steps where 101 were asked: a fixed list", prompt="a cat")


def test_offloaded_pipelines() -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.unet._hf_hook = object()
    refused(pipeline, r"is offloaded \(unet\); load it without offloading", prompt="the cat")


def test_what_is_no_pipeline() -> None:
    refused(nn.Linear(1, 1), "Linear is not a diffusers pipeline")


def test_unknown_arguments() -> None:
    refused(tiny_ddim(), "takes no argument prompt, strength", prompt="x", strength=1)
    refused(tiny_stable_diffusion(), "remove latents from the call", prompt="x", latents=torch.zeros(1))


def test_the_pipelines_own_words_are_passed_on() -> None:
    words = "failed under the recorder: TypeError: .*negative_prompt.*; check the arguments of the call"
    refused(tiny_stable_diffusion(), words, prompt="x", negative_prompt=5)


def test_schedules_that_lead_from_data_to_noise() -> None:
    inverted = synthetic(Traits(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    refused(inverted, r"walks from t=0 to t=0.9\d*, from data to noise", prompt="a cat")
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDIMInverseScheduler()
    refused(pipeline, "from data to noise", prompt="the cat")


def test_timesteps_that_do_not_name_the_noise_level() -> None:
    class Apart(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.timesteps**2 / 1000

    words = r"gives the network the timestep [\d.]+ at the noise level 0.9\d+"
    refused(synthetic(Traits(), Apart(shift=2.0)), words, prompt="a cat")


class _Masked(TraitPipeline):
    """The sample is mixed with something else before the network sees it."""

    def _ask(self, x: Any, *rest: Any) -> Any:
        return super()._ask(x * 0.5 + 1, *rest)


def test_a_sample_that_is_mixed_with_something_else() -> None:
    pipeline = _Masked(**synthetic(Traits(guidance="none")).components)
    words = "no argument of network equals the sample .*: the pipeline scales it .*; take another teacher"
    refused(pipeline, words, prompt="a cat")


class _Bent(TraitPipeline):
    """The answer is changed in a way that is no sign, half or order."""

    def _ask(self, *arguments: Any) -> Any:
        return super()._ask(*arguments) ** 3


def test_an_answer_that_is_changed() -> None:
    pipeline = _Bent(**synthetic(Traits(guidance="none")).components)
    words = "the output of network is not what the scheduler is given.* switch off .* or take another teacher"
    refused(pipeline, words, prompt="a cat")


class _Following(TraitPipeline):
    """The conditioning follows the trajectory."""

    def _ask(self, x: Any, t: Any, following: Any, text: Any, mask: Any) -> Any:
        return super()._ask(x, t, following, text + x.mean(), mask)


def test_conditioning_that_follows_the_trajectory() -> None:
    pipeline = _Following(**synthetic(Traits(guidance="none")).components)
    refused(pipeline, "text of network changes between steps and is not one time per sample", prompt="a cat")


class _Timeless(TraitPipeline):
    """The network is told no time."""

    def _time(self, t: Any, batch: int) -> Any:
        return torch.full((batch,), 500.0)


def test_a_network_without_a_time() -> None:
    refused(_Timeless(**synthetic(Traits()).components), "no argument of network follows the scheduler's", prompt="a")


def test_wrong_kinds_of_items() -> None:
    labels, prompts, nothing = record(tiny_dit()), record(tiny_stable_diffusion()), record(tiny_ddim())
    with pytest.raises(RecordingError, match="takes class labels, not prompts"):
        labels.condition(["a"])
    with pytest.raises(RecordingError, match="takes prompts, not class labels"):
        prompts.condition(labels=[1])
    with pytest.raises(RecordingError, match="must be a list of strings"):
        prompts.condition("a cat")
    with pytest.raises(RecordingError, match="conditioned on a prompt; give at least one"):
        prompts.condition()
    with pytest.raises(RecordingError, match="conditioned on nothing"):
        nothing.condition(["a"])
    assert nothing.condition().batch_size == 1


def test_images_of_another_size() -> None:
    recording = record(tiny_stable_diffusion(), prompt="the cat")
    with pytest.raises(RecordingError, match=r"\[4, 16, 16\] and the recording holds for \[4, 8, 8\]; resize"):
        recording.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(RecordingError, match="x0 have shape"):
        recording.decode(torch.zeros(1, 4, 4, 4))
