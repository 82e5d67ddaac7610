"""Teachers of some size with random weights, each of another family, to measure memory on; what they paint is noise.

Their denoisers are what they are about: encoders and decoders are small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
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
    UMT5Config,
    UMT5EncoderModel,
)

from fewstep.fashion import teacher_path
from fewstep.programs.planning.dry_run import World

_WIDTH = 64  # of the text encoders


@dataclass(frozen=True)
class Shape:
    """A teacher to measure on.

    Attributes:
        build: makes its pipeline, with random weights, its networks in the given context.
        call: further keyword arguments of the pipeline's call.
        batch_size: at which it is measured.
    """

    build: Callable[[World], DiffusionPipeline]
    call: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 2


def unet(world: World) -> StableDiffusionPipeline:
    """A text-conditioned UNet of 135 M parameters on latents (4, 32, 32), epsilon prediction."""
    return _stable_diffusion(
        world,
        sample_size=32,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )


def small_unet(world: World) -> StableDiffusionPipeline:
    """The same of 9 M parameters on latents (4, 16, 16): what training steps are timed on."""
    return _stable_diffusion(
        world,
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )


def sd3(world: World) -> StableDiffusion3Pipeline:
    """A two-stream transformer on latents (16, 64, 64), flow matching."""
    tokenizer = _tokenizer()
    sizes = {"d_model": 2 * _WIDTH, "d_kv": 8, "d_ff": _WIDTH, "num_layers": 1, "num_heads": 2}
    with world():
        network = SD3Transformer2DModel(
            sample_size=64,
            num_layers=8,
            attention_head_dim=64,
            num_attention_heads=8,
            joint_attention_dim=2 * _WIDTH,
            caption_projection_dim=512,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=64,
        )
        vae, encoders = _autoencoder(16), [_clip(tokenizer, projection=True) for _ in range(2)]
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes))
    return StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    )


def dit(world: World) -> DiTPipeline:
    """A class-conditioned transformer on latents (4, 32, 32), epsilon with learnt variance."""
    with world():
        network = DiTTransformer2DModel(
            num_attention_heads=8, attention_head_dim=64, num_layers=12, sample_size=32, in_channels=4, out_channels=8
        )
        vae = _autoencoder()
    return DiTPipeline(network, vae, DDIMScheduler())


def wan(world: World) -> WanPipeline:
    """A video transformer on latents (16, 3, 32, 32), flow matching."""
    tokenizer = _tokenizer()
    sizes = {"d_model": _WIDTH, "d_kv": 8, "d_ff": _WIDTH, "num_layers": 1, "num_heads": 2}
    with world():
        network = WanTransformer3DModel(
            num_attention_heads=8, attention_head_dim=64, text_dim=_WIDTH, freq_dim=256, ffn_dim=2048, num_layers=10
        )
        vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **sizes))
    return WanPipeline(tokenizer, encoder, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=network)


def sdxl(world: World) -> StableDiffusionXLPipeline:
    """SDXL's own UNet, 2,567 M parameters, on latents (4, 128, 128), which is 1024 px."""
    tokenizer = _tokenizer()
    with world():
        network = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        vae = _autoencoder()
        encoders = _clip(tokenizer, width=768), _clip(tokenizer, projection=True, width=1280)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=network,
        scheduler=EulerDiscreteScheduler(),
    )


def _stable_diffusion(world: World, **sizes: Any) -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    with world():
        network = UNet2DConditionModel(attention_head_dim=8, cross_attention_dim=_WIDTH, **sizes)
        vae, text_encoder = _autoencoder(), _clip(tokenizer)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(teacher_path("fashion-sd") / "tokenizer")


def _clip(
    tokenizer: CLIPTokenizer, *, projection: bool = False, width: int = _WIDTH
) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    """Small, with the usual eight pixels to a latent."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
    )


#: Every shape by name.
SHAPES: dict[str, Shape] = {
    "unet": Shape(unet),
    "small_unet": Shape(small_unet, batch_size=8),
    "sd3": Shape(sd3, {"height": 512, "width": 512, "max_sequence_length": 64}, batch_size=1),
    "dit": Shape(dit),
    "wan": Shape(wan, {"height": 256, "width": 256, "num_frames": 9, "max_sequence_length": 64}, batch_size=1),
    "sdxl": Shape(sdxl, batch_size=1),
}
