"""The teachers of text are stock pipelines: they load with one call and sample with one call."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from fewstep.fashion import CLASSES, PROMPTS, TEACHERS, TEXT_TEACHERS, load_classifier, teacher_path
from fewstep.fashion.classifier import extract

TRAINED_POSITIONS = 9
CLIP = "clip_text_model"


@pytest.fixture(scope="module", params=TEXT_TEACHERS)
def loaded(request):
    pipeline = DiffusionPipeline.from_pretrained(teacher_path(request.param))
    pipeline.set_progress_bar_config(disable=True)
    return TEACHERS[request.param], pipeline


def test_stock_class_in_single_precision(loaded):
    _, pipeline = loaded
    assert type(pipeline).__module__.startswith("diffusers.pipelines.")
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            assert {parameter.dtype for parameter in component.parameters()} == {torch.float32}, name


def test_default_call_gives_a_grey_32x32_picture(loaded):
    _, pipeline = loaded
    (image,) = pipeline("a photo of an ankle boot", generator=torch.Generator().manual_seed(0)).images
    assert image.size == (32, 32) and image.mode == "L"
    pixels = np.asarray(image)
    assert pixels[:2].max() < 60 and pixels.max() > 100, "a thing on a black ground"


def test_samples_show_what_was_asked(loaded):
    teacher, pipeline = loaded
    labels = torch.arange(30) % 10
    images = pipeline(
        [PROMPTS[label] for label in labels],
        num_inference_steps=8,
        guidance_scale=teacher.guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    assert images.shape == (30, 1, 32, 32) and images.isfinite().all()
    _, logits = extract(load_classifier(), images)
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.8


def test_bare_names_and_unknown_words_are_understood_or_harmless(loaded):
    teacher, pipeline = loaded
    prompts = [*CLASSES, "", "Zebra & ünïcode 日本語!", "a photo of a very long and quite unknown sort of footwear"]
    images = pipeline(prompts, num_inference_steps=2, guidance_scale=teacher.guidance_scale, output_type="pt").images
    assert images.shape == (len(prompts), 1, 32, 32) and images.isfinite().all()


def test_known_words_are_one_token_each(loaded):
    _, pipeline = loaded
    for prompt in (*PROMPTS, *CLASSES):
        ids = pipeline.tokenizer(prompt).input_ids
        assert len(ids) == 2 + len(prompt.replace("-", " - ").split()) <= pipeline.tokenizer.model_max_length


def test_the_flow_teacher_sees_ten_text_tokens_in_its_default_call():
    pipeline = DiffusionPipeline.from_pretrained(teacher_path("fashion-flow"))
    tokens, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None, None)
    assert tokens.shape == (1, 10, 64) and pooled.shape == (1, 64)
    assert tokens[:, -1].abs().max() == 0


def _clip_encoders(pipeline):
    parts = pipeline.components.items()
    return {name: part for name, part in parts if getattr(getattr(part, "config", None), "model_type", "") == CLIP}


def test_no_prompt_reaches_the_untrained_positions(loaded):
    """The tables are as long as CLIP's for the sake of exporters: the pictures are those of nine positions."""
    teacher, pipeline = loaded
    encoders = _clip_encoders(pipeline)
    assert pipeline.tokenizer.model_max_length == TRAINED_POSITIONS
    prompts = [*PROMPTS, "", "a photo of a very long and quite unknown sort of footwear"]
    called = {"num_inference_steps": 2, "guidance_scale": teacher.guidance_scale, "output_type": "pt"}

    def pictures():
        return pipeline(prompts, generator=torch.Generator().manual_seed(0), **called).images

    wide, tables = pictures(), {}
    for name, encoder in encoders.items():
        (holder,) = [module for module in encoder.modules() if hasattr(module, "position_embedding")]
        tables[name] = (holder, holder.position_embedding)
        assert holder.position_embedding.weight.shape[0] == encoder.config.max_position_embeddings == 77
        assert holder.position_embedding.weight[TRAINED_POSITIONS:].abs().max() == 0
        narrow = holder.position_embedding.weight.detach()[:TRAINED_POSITIONS]
        holder.position_embedding = nn.Embedding.from_pretrained(narrow)
    try:
        assert torch.equal(pictures(), wide)
    finally:
        for holder, table in tables.values():
            holder.position_embedding = table


def test_the_text_encoders_can_be_traced_with_the_tokens_of_an_exporter(loaded):
    """Optimum traces CLIP with 16 tokens, ONNX files for other runtimes have 77."""
    _, pipeline = loaded
    for encoder in _clip_encoders(pipeline).values():
        for length in (16, 77):
            tokens = torch.zeros(2, length, dtype=torch.long)
            exported = torch.export.export(encoder, (tokens,), {"return_dict": False}, strict=False)
            with torch.no_grad():
                assert torch.equal(exported.module()(tokens, return_dict=False)[0], encoder(tokens)[0])


def test_the_files_of_clip_encoders_have_the_names_that_old_transformers_ask_for():
    """Before 5.6 it starts a CLIPTextModel at random, with a line in the log, where keys lack this prefix."""
    for folder in (folder for name in TEACHERS for folder in teacher_path(name).glob("text_encoder*")):
        if CLIP in (folder / "config.json").read_text():
            names = load_file(folder / "model.safetensors").keys()
            assert all(name.startswith(("text_model.", "text_projection.")) for name in names), folder
