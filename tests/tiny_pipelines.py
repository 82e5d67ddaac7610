"""Stock diffusers pipelines with tiny random weights, built in well under a second, for tests that need a pipeline.

Every weight is drawn from a fixed seed. Zero-initialised layers stay zero, as in a fresh network: tests that need a
network which reacts to everything shake it (`fewstep.recording.watch.shake.shaken`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

_LENGTH = 24  # tokens of a prompt


@contextlib.contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tiny_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer over single characters and a few merges."""
    characters = [chr(c) for c in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
        logger.setLevel(logging.ERROR)
        try:
            return CLIPTokenizer.from_pretrained(folder, model_max_length=_LENGTH)
        finally:
            logger.setLevel(level)


def _text_encoder(tokenizer: CLIPTokenizer, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_LENGTH,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()


def tiny_ddim() -> DDIMPipeline:
    """Unconditional, pixels (3, 8, 8), epsilon on a linear table."""
    with _seeded():
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()
        pipeline = DDIMPipeline(unet, DDIMScheduler())
    return _quiet(pipeline)


def tiny_dit() -> DiTPipeline:
    """Class labels 0..9, latents (4, 8, 8), epsilon with learnt variance, a null class behind the labels."""
    with _seeded():
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        ).eval()
        pipeline = DiTPipeline(transformer, _autoencoder(), DDIMScheduler())
    return _quiet(pipeline)


def tiny_stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Prompts, latents (4, 8, 8), a UNet on the scaled linear table."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return _stable_diffusion(scheduler)


def tiny_edm() -> StableDiffusionPipeline:
    """As `tiny_stable_diffusion`, with an EDM-preconditioned network: sigma from 80 down, time ln(sigma) / 4."""
    return _stable_diffusion(EDMEulerScheduler())


def _stable_diffusion(scheduler: Any) -> StableDiffusionPipeline:
    with _seeded():
        tokenizer = tiny_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _quiet(pipeline)


def _t5_config(vocabulary: int) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5Config(vocab_size=vocabulary, pad_token_id=0, **sizes)


def tiny_flow(shift: float = 3.0) -> StableDiffusion3Pipeline:
    """Prompts, latents (4, 8, 8), a flow-matching transformer under a shifted grid."""
    with _seeded():
        tokenizer = tiny_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        ).eval()
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=_autoencoder(),
            text_encoder=_text_encoder(tokenizer, projection=True),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(tokenizer, projection=True),
            tokenizer_2=tokenizer,
            # Stock diffusers saves this pipeline without its third text encoder, but does not load it again.
            text_encoder_3=T5EncoderModel(_t5_config(len(tokenizer))).eval(),
            tokenizer_3=tokenizer,
        )
    return _quiet(pipeline)


def tiny_kandinsky3() -> Kandinsky3Pipeline:
    """Prompts, latents (4, 8, 8); the negative is as long as the prompt, and beside it the prompt's mask is boolean."""
    with _seeded():
        tokenizer = tiny_tokenizer()
        pipeline = Kandinsky3Pipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(_t5_config(len(tokenizer))).eval(),
            unet=Kandinsky3UNet(
                time_embedding_dim=4,
                groups=2,
                attention_head_dim=4,
                block_out_channels=(8, 16),
                cross_attention_dim=4,
                encoder_hid_dim=32,
            ).eval(),
            scheduler=DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing"),
            movq=VQModel(
                block_out_channels=(32, 64),
                down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
                up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
                latent_channels=4,
                norm_num_groups=8,
                norm_type="spatial",
                num_vq_embeddings=12,
                vq_embed_dim=4,
            ).eval(),
        )
    return _quiet(pipeline)


def tiny_wan(boundary_ratio: float = 0.875, shift: float = 3.0) -> WanPipeline:
    """Prompts, video latents (16, 3, 2, 2), two flow-matching transformers: one above the boundary, one below."""
    with _seeded():
        tokenizer = tiny_tokenizer()
        sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 16}
        high, low = (
            WanTransformer3DModel(in_channels=16, out_channels=16, num_layers=2, rope_max_seq_len=32, **sizes).eval()
            for _ in range(2)
        )
        for parameter in low.parameters():  # most layers start alike; the two must not be taken for each other
            parameter.data += 0.1 * torch.randn(parameter.shape)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(_t5_config(len(tokenizer))).eval(),
            vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            transformer=high,
            transformer_2=low,
            boundary_ratio=boundary_ratio,
        )
    return _quiet(pipeline)


def dense_wan() -> WanPipeline:
    """Wan with one network, as before 2.2."""
    pipeline = tiny_wan()
    pipeline.register_modules(transformer_2=None)
    pipeline.register_to_config(boundary_ratio=None)
    return pipeline


#: Keyword arguments under which `tiny_wan` is fast.
WAN_CALL = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 8}


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


#: Every builder by name, and the keyword arguments under which it is fast.
TINY: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddim": (tiny_ddim, {}),
    "dit": (tiny_dit, {"class_labels": [1]}),
    "stable_diffusion": (tiny_stable_diffusion, {"prompt": "the cat"}),
    "flow": (tiny_flow, {"prompt": "the cat", "height": 16, "width": 16, "max_sequence_length": 8}),
    "edm": (tiny_edm, {"prompt": "the cat"}),
}
