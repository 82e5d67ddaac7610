"""How the inpainting teacher is made: from fashion-sd, whose answer it starts with, and how it is judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fewstep.conditioning.item import Item
from fewstep.eval.fashion import inpainting
from fewstep.eval.fashion.evaluate import given
from fewstep.eval.fashion.measure import kept_floors
from fewstep.eval.scorers.kept import KeptScorer, kept
from fewstep.fashion import held_back_images, teacher_path
from fewstep.fashion.holes import hole
from fewstep.fashion.items import inpainting_items


@pytest.fixture(scope="module")
def warm() -> Any:
    return StableDiffusionPipeline.from_pretrained(teacher_path(inpainting.WARM))


@pytest.fixture(scope="module")
def examples(warm: Any) -> dict[str, torch.Tensor]:
    holes = torch.stack([hole(1, index) for index in range(4)])[:, None]
    found = inpainting.encoded(warm.vae, held_back_images()[0][:4], holes, batch_size=3)
    return {name: value.clone() for name, value in found.items()}


def test_it_starts_with_the_answer_of_the_teacher_it_is_made_from(warm: Any, examples: dict) -> None:
    unet = inpainting.InpaintTeacher(warm).unet
    x_t, t, words = examples["x0"], torch.tensor([10, 300, 600, 990]), torch.randn(4, 9, 64)
    beside = torch.cat([x_t, examples["holes"], examples["known"]], 1)
    with torch.no_grad():
        expected = warm.unet(x_t, t, encoder_hidden_states=words).sample
        torch.testing.assert_close(unet(beside, t, encoder_hidden_states=words).sample, expected, rtol=1e-4, atol=1e-5)


def test_its_loss_reaches_the_new_channels_and_nothing_of_the_frozen_parts(warm: Any, examples: dict) -> None:
    teacher = inpainting.InpaintTeacher(warm)
    labels = torch.arange(4)
    loss = teacher.loss(examples, labels, torch.Generator().manual_seed(0))
    loss.backward()
    assert teacher.unet.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0
    assert all(p.grad is None for part in (warm.vae, warm.text_encoder, warm.unet) for p in part.parameters())
    again = teacher.loss(examples, labels, torch.Generator().manual_seed(0))
    assert again == loss, "all that is random is the step's"


def test_examples_are_what_the_pipeline_makes_of_the_same_items(warm: Any) -> None:
    """Its own latents of the masked picture are the mean plus the drawn part, and its mask is ours."""
    items = inpainting_items(3, seed=4)
    pipeline = inpainting.InpaintTeacher(warm).pipeline()
    seen: list[torch.Tensor] = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {name: [item.arguments[name] for item in items] for name in items[0].arguments}
    pipeline(**arguments, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    holes = torch.stack([hole(4, index) for index in range(3)])[:, None]
    rows = [int(item.name.split()[-1]) for item in items]
    examples = inpainting.encoded(warm.vae, held_back_images()[0][rows], holes)
    assert torch.equal(seen[0][:, 4:5], examples["holes"])
    deviation = inpainting.LATENT_NOISE * warm.vae.config.scaling_factor
    off = (seen[0][:, 5:] - examples["known"]) / deviation
    assert off.abs().max() < 5 and 0.8 < off.std() < 1.2


def test_the_autoencoder_of_colours_is_the_grey_one(warm: Any) -> None:
    grey = held_back_images()[0][:2].float() / 127.5 - 1
    coloured = inpainting.coloured(warm.vae)
    with torch.no_grad():
        latents = warm.vae.encode(grey).latent_dist.mean
        torch.testing.assert_close(
            coloured.encode(grey.expand(-1, 3, -1, -1)).latent_dist.mean, latents, rtol=1e-4, atol=1e-5
        )
        expected = warm.vae.decode(latents).sample.expand(-1, 3, -1, -1)
        torch.testing.assert_close(coloured.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)


def test_kept_counts_given_pixels_alone() -> None:
    holes = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    holes[0, :, :2] = True
    pictures = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    images = pictures.clone()
    images[0, :, :2] = 255
    assert kept(images, pictures, holes).tolist() == [1.0, 1.0]
    images[0, :, 3] = 51  # a fifth, on half of what is given
    images[1, :, 3] = 51  # on a quarter
    torch.testing.assert_close(kept(images, pictures, holes), torch.tensor([0.9, 0.95], dtype=torch.float64))
    colours = images.expand(-1, 3, -1, -1)
    torch.testing.assert_close(kept(colours, pictures, holes), kept(images, pictures, holes))
    assert kept(images, pictures, torch.ones_like(holes)).tolist() == [1.0, 1.0]


def test_the_scorer_compares_each_sample_with_its_own_item() -> None:
    items = inpainting_items(3)
    pictures, holes = given(items)
    scorer = KeptScorer()
    assert scorer(pictures, items)["kept"].tolist() == [1.0, 1.0, 1.0]
    turned = scorer(pictures.expand(-1, 3, -1, -1), [*items[1:], items[0]])["kept"]
    assert turned.max() < 0.97 and torch.equal(turned, kept(pictures, pictures.roll(-1, 0), holes.roll(-1, 0)))
    double = pictures.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert scorer(double, items)["kept"].min() > 0.97, "pictures are brought to the size of the samples"
    for asked in (None, ["a coat"] * 3, [Item({"prompt": "a coat", "image": items[0].arguments["image"]})] * 3):
        with pytest.raises(ValueError, match="picture and the mask"):
            scorer(pictures, asked)


def test_the_floors_of_kept_are_far_apart() -> None:
    floors = kept_floors(inpainting_items(40))
    assert floors["autoencoder"] > 0.97 and floors["blind"] < 0.92
