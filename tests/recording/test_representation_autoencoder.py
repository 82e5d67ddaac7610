"""Latents of a representation autoencoder, through diffusers' own class, and of one that only decodes."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from tiny_pipelines import tiny_dit

from fewstep.errors import UserError
from fewstep.programs.distillation import distill
from fewstep.recording import record
from fewstep.recording.codec import refuse_no_encoder

diffusers = pytest.importorskip("diffusers", minversion="0.42")
RUN = {
    "classes": "0-9",
    "steps": 2,
    "max_steps": 3,
    "batch_size": 2,
    "sample_steps": 0,
    "report_to": "none",
    "cpu": True,
}


def tiny_rae() -> DiTPipeline:
    """Class labels, latents (64, 2, 2) of a ViT of one layer, images of 16x16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = diffusers.AutoencoderRAE(
            encoder_type="mae",
            encoder_hidden_size=64,
            encoder_patch_size=8,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
            patch_size=8,
            encoder_input_size=16,
            latents_mean=[[[0.1]]] * 64,
            latents_std=[[[2.0]]] * 64,
        ).eval()
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=64,
            out_channels=64,
            num_layers=1,
            sample_size=2,
            patch_size=1,
            num_embeds_ada_norm=1000,
        ).eval()
        pipeline = DiTPipeline(transformer, autoencoder, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(folder: Path) -> str:
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
        Image.new("RGB", (16, 16), (25 * k, 90, 200)).save(folder / str(k) / "a.png")
    return str(folder)


def test_images_are_encoded_in_the_range_and_the_statistics_of_the_class():
    pipeline = tiny_rae()
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = pipeline.vae.encode(pictures).latent
    torch.testing.assert_close(record(pipeline).encode(pictures), expected, rtol=1e-4, atol=1e-4)


def test_mf_rae_is_distilled_in_such_latents_through_all_its_stages(tmp_path: Path):
    how = {"stages": "cmt:1,mfd:1,mft", "walk_steps": 2, "guidance_scale": 1.0, "apart": 0.75, "ema_decay": 0.5}
    data = images(tmp_path / "images")
    folder = distill(tiny_rae(), "mf_rae", out=str(tmp_path / "run"), data=data, **RUN, **how)
    assert (folder / "vae" / "config.json").is_file() and (folder / "second_time" / "config.json").is_file()
    # And a run that is stopped in one stage goes on in the next.
    cut = {**RUN, "max_steps": 2, "checkpointing_steps": 1}
    part = {**how, "stages": "cmt:1,mfd:1"}
    distill(tiny_rae(), "mf_rae", out=str(tmp_path / "cut"), data=data, **cut, **part)


def test_an_autoencoder_without_an_encoder_is_refused_where_images_are_needed(tmp_path: Path):
    pipeline = tiny_dit()
    pipeline.vae.encoder = None
    with pytest.raises(UserError, match=r"AutoencoderKL, has no encoder.*leave out --data") as caught:
        distill(pipeline, "mf_rae", out=str(tmp_path / "run"), data=images(tmp_path / "images"), stages="mft", **RUN)
    assert "\n" not in str(caught.value)
    refuse_no_encoder(tiny_dit())
