"""What is not finite is named with the component that made it and the timestep, and no untrue reason is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from synthetic import TraitPipeline, synthetic
from tiny_pipelines import WAN_CALL, tiny_ddim, tiny_flow, tiny_stable_diffusion, tiny_wan
from torch import nn

from fewstep.cli import main
from fewstep.recording import RecordingError, record
from tests.recording.synthetic_parts import Traits

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def _refused(pipeline: Any, words: str, **call: Any) -> None:
    with pytest.raises(RecordingError, match=words) as caught:
        record(pipeline, **call).prove()
    assert "\n" not in str(caught.value)


def _spoil(weight: nn.Parameter, bad: float) -> None:
    weight.data.view(-1)[0] = bad


@BAD
def test_one_weight_of_the_network(bad: float) -> None:
    pipeline = tiny_stable_diffusion()
    _spoil(pipeline.unet.conv_in.weight, bad)
    words = (
        r"the unet of \S+ answers with NaN or infinity at timestep \d+: its conv_in.weight is not finite; load weights"
    )
    _refused(pipeline, words, prompt="the cat")


@BAD
def test_one_weight_of_an_unconditional_network(bad: float) -> None:
    pipeline = tiny_ddim()
    _spoil(pipeline.unet.conv_out.bias, bad)
    _refused(pipeline, r"the unet of DDIMPipeline .* at timestep 750: its conv_out.bias is not finite")


def test_one_weight_of_a_flow_network() -> None:
    pipeline = tiny_flow()
    _spoil(pipeline.transformer.proj_out.weight, math.inf)
    call = {"height": 16, "width": 16, "max_sequence_length": 8}
    _refused(pipeline, r"the transformer of \S+ .* at timestep 1000: its proj_out.weight", prompt="the cat", **call)


def test_one_weight_of_the_second_of_two_networks() -> None:
    pipeline = tiny_wan()
    _spoil(pipeline.transformer_2.proj_out.weight, math.nan)
    _refused(pipeline, r"the transformer_2 of WanPipeline .* at timestep 857.*: its proj_out.weight", **WAN_CALL)


@BAD
def test_embeddings(bad: float) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.text_encoder.get_input_embeddings().weight.data[:] = bad
    words = (
        r"the text_encoder of \S+ answers with NaN or infinity at timestep \d+: its \S*token_embedding.weight is not"
    )
    _refused(pipeline, words, prompt="the cat")


def test_the_embedding_of_one_word() -> None:
    """The recording's own prompt lacks it; the prompt that has it is named."""
    pipeline = tiny_stable_diffusion()
    (word,) = pipeline.tokenizer("dog", add_special_tokens=False).input_ids[:1]
    pipeline.text_encoder.get_input_embeddings().weight.data[word] = math.nan
    recording = record(pipeline, prompt="the cat")
    recording.condition_each(["the cat"])
    with pytest.raises(
        RecordingError, match=r"text_encoder of .* before the first step for 'the dog': its .* not finite"
    ):
        recording.condition_each(["the cat", "the dog"])


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_noise_predicted_from_noise_alone(kind: Any) -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    words = rf"{kind.__name__} of \S+ makes a sample that is not finite .* at timestep 999: its network predicts noise"
    _refused(pipeline, words, prompt="the cat")


def test_a_start_below_noise_alone() -> None:
    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="leading", clip_sample=False)
    record(pipeline, prompt="the cat").prove()


def test_a_decoder() -> None:
    pipeline = tiny_stable_diffusion()
    _spoil(pipeline.vae.decoder.conv_out.bias, math.nan)
    words = r"the vae of \S+ answers with NaN or infinity after the last step: its decoder.conv_out.bias is not finite"
    _refused(pipeline, words, prompt="the cat")


def test_a_decoder_that_overflows_in_half_precision() -> None:
    pipeline = tiny_stable_diffusion().to(torch.float16)
    for weight in pipeline.vae.decoder.conv_in.parameters():
        weight.data *= 60000
    _refused(
        pipeline, "the vae of .* after the last step: its weights are finite, but float16 ends at", prompt="the cat"
    )


def test_an_encoder() -> None:
    pipeline = tiny_stable_diffusion()
    _spoil(pipeline.vae.encoder.conv_in.weight, math.inf)
    recording = record(pipeline, prompt="the cat")
    recording.prove()
    with pytest.raises(RecordingError, match=r"the vae of .* to images: its encoder.conv_in.weight is not finite"):
        recording.encode(torch.rand(1, 3, 16, 16))


def test_a_sum_of_finite_answers() -> None:
    class Dividing(TraitPipeline):
        def _scale(self, w: float, t: Any) -> float:
            return math.inf

    pipeline = Dividing(**synthetic(Traits()).components)
    _refused(pipeline, r"Dividing makes NaN of its networks' finite answers at timestep \d+", prompt="a cat")


def test_masks_may_hold_infinities() -> None:
    class Masked(TraitPipeline):
        def _told(self, prompts: list[str]) -> Any:
            text, _ = super()._told(prompts)
            return text, torch.zeros(len(prompts), text.shape[1]).masked_fill_(
                torch.arange(text.shape[1]) > 3, -math.inf
            )

        def _ask(self, x: Any, t: Any, following: Any, text: Any, mask: Any) -> Any:
            return super()._ask(x, t, following, text, mask.exp())

    pipeline = Masked(**synthetic(Traits(guidance="none")).components)
    record(pipeline, prompt="a cat").prove()


def test_the_command_line_names_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_ddim()
    _spoil(pipeline.unet.conv_in.weight, math.inf)
    pipeline.save_pretrained(tmp_path / "teacher")
    assert main(["probe", str(tmp_path / "teacher")]) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("fewstep: ")]
    assert "its conv_in.weight is not finite" in line
