"""Tiny stock pipelines that change samples outside of their network: pins, tails and frames that are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_image
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FluxKontextInpaintPipeline,
    KandinskyV22InpaintPipeline,
    LTXConditionPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    UNet2DConditionModel,
    VQModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from PIL import Image

#: A pipeline, two items with different pictures, and the rest of its call.
Made = tuple[Any, list[dict[str, Any]], dict[str, Any]]


def a_first_frame() -> Made:
    """Pinned as it is, whatever a scheduler says, and no token's time but 0."""
    pipeline = LTXConditionPipeline(**zoo_image.load("LTXImageToVideo").components)
    items = [{"prompt": f"{word} boat", "image": _picture(n, 32)} for n, word in enumerate(("a", "the"))]
    return _quiet(pipeline), items, {**zoo_image.call_of("LTXImageToVideo"), "image_cond_noise_scale": 0.0}


def a_later_frame() -> Made:
    """Tokens in front of the sample's, which are cut before decoding."""
    pipeline, items, call = a_first_frame()
    return pipeline, items, {**call, "frame_index": 8}


def a_kept_region() -> Made:
    """What a mask keeps, under the walk's first noise; the network is told the picture too."""
    pipeline = FluxKontextInpaintPipeline(**_text_only("Flux"))
    items = [
        {"prompt": f"{word} boat", "image": _picture(n, 8), "mask_image": _mask(n, 8)}
        for n, word in enumerate(("a", "the"))
    ]
    call = {"height": 8, "width": 8, "max_sequence_length": 48, "max_area": 64, "_auto_resize": False}
    return _quiet(pipeline), items, call


def a_kept_region_under_control() -> Made:
    """The same under a table's noise, by Euler's steps, beside a control network."""
    pipeline = StableDiffusionXLControlNetInpaintPipeline(**zoo_image.load("ControlNetXL").components)
    items = [
        {"prompt": word, "image": _picture(n, 32), "mask_image": _mask(n, 32), "control_image": _picture(n + 30, 32)}
        for n, word in enumerate(("a boat", "the boat"))
    ]
    call = {name: value for name, value in zoo_image.call_of("ControlNetXL").items() if name != "control_guidance_end"}
    return _quiet(pipeline), items, {**call, "strength": 1.0}


def a_kept_region_of_latents() -> Made:
    """A region that the network is told of, too; it answers in twice the channels, of which the pipeline takes half."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: Any = {
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        }
        told: Any = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8}
        sizes: Any = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        heads: Any = {"cross_attention_dim": 8, "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"}
        unet = UNet2DConditionModel(sample_size=16, in_channels=9, out_channels=8, **sizes, **heads, **blocks, **told)
        coder: Any = {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        }
        small: Any = {"block_out_channels": (32, 32), "norm_num_groups": 4, "latent_channels": 4, "vq_embed_dim": 4}
        movq = VQModel(norm_type="spatial", num_vq_embeddings=12, **small, **coder)
        for parameter in (*unet.parameters(), *movq.parameters()):
            parameter.data += 0.1 * torch.randn_like(parameter)
    noises: Any = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **noises)
    pipeline = KandinskyV22InpaintPipeline(unet=unet.eval(), scheduler=scheduler, movq=movq.eval())
    *own, negative = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    items = [
        {"image_embeds": one, "negative_image_embeds": negative, "image": _picture(n, 32), "mask_image": _mask(n, 32)}
        for n, one in enumerate(own)
    ]
    return _quiet(pipeline), items, {"height": 32, "width": 32}


def frames_for_references() -> Made:
    """Frames in front of the sample's that the network is told and that are cut before decoding."""
    parts = _text_only("Wan")
    own, parts = parts["transformer"].config, {name: part for name, part in parts.items() if "transformer" not in name}
    names = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim")
    names += ("freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "rope_max_seq_len")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        channels = 2 * parts["vae"].config.z_dim + 64
        told = {name: own[name] for name in names}
        network: Any = WanVACETransformer3DModel(**told, vace_layers=[0], vace_in_channels=channels)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline = WanVACEPipeline(**parts, transformer=network.eval())
    items = []
    for number, word in enumerate(("a", "the")):
        video = [_picture(number + 10 * k, 16) for k in range(9)]
        shown = {"video": video, "mask": [_mask(number, 16)] * 9, "reference_images": [_picture(number + 40, 16)]}
        items.append({"prompt": f"{word} boat", **shown})
    return _quiet(pipeline), items, {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}


def _picture(number: int, side: int) -> Image.Image:
    draws = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    return Image.fromarray(draws.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def _mask(number: int, side: int) -> Image.Image:
    half, mask = side // 2, Image.new("L", (side, side), 0)
    mask.paste(255, (half * number, 0, half * number + half, side))
    return mask


def _text_only(name: str) -> dict[str, Any]:
    folder = zoo_image.FOLDER.parent / "zoo" / name
    if not folder.is_dir():
        pytest.skip("needs the folder of tiny pipelines")
    return dict(DiffusionPipeline.from_pretrained(folder, local_files_only=True).components)


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
