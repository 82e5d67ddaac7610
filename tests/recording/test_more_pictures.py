"""More stock pipelines that are told pictures, of the mechanisms of the shown ones: made of tiny other ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_image
from diffusers import (
    AutoencoderKLWan,
    BriaFiboEditPipeline,
    BriaFiboTransformer2DModel,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    CogVideoXFunControlPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    HunyuanVideoImageToVideoPipeline,
    LDMSuperResolutionPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SD3ControlNetModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionDepth2ImgPipeline,
    T2IAdapter,
    UNet2DModel,
    VQModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from test_item_pipelines import _items, _parts, _without, proven
from torch import nn
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from fewstep.export import plan_student

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("texts_as_they_are")]

Made = tuple[Any, list[dict[str, Any]], dict[str, Any]]
_VIDEO: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16}


def _shaken(network: nn.Module) -> Any:
    """Every part of it says something."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network.eval()


def _deeper(parts: dict[str, Any]) -> dict[str, Any]:
    """With a second block: residuals of a control network reach some families' last block no more."""
    own = parts["transformer"]
    parts["transformer"] = _shaken(type(own).from_config({**own.config, "num_layers": 2}))
    return parts


def _flux(zoo: Path) -> Made:
    parts = _parts(zoo / "Flux")
    config = parts["transformer"].config
    names = ("attention_head_dim", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim")
    sizes = {name: config[name] for name in (*names, "in_channels", "axes_dims_rope", "patch_size")}
    parts["controlnet"] = _shaken(FluxControlNetModel(num_layers=1, num_single_layers=1, **sizes))
    call = {"height": 8, "width": 8, "max_sequence_length": 48}
    return FluxControlNetPipeline(**parts), _items(8, picture="control_image"), call


def _sd3(zoo: Path) -> Made:
    """Its control is drawn from the global state, apart for each answer of a guided step."""
    parts = _deeper(_parts(zoo / "StableDiffusion3"))
    config = parts["transformer"].config
    names = ("sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "out_channels")
    wide = ("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim")
    parts["controlnet"] = _shaken(SD3ControlNetModel(num_layers=1, **{n: config[n] for n in (*names, *wide)}))
    call = {"height": 32, "width": 32, "max_sequence_length": 32}
    return StableDiffusion3ControlNetPipeline(**parts), _items(32, picture="control_image"), call


def _qwen(zoo: Path) -> Made:
    """One call of its control network serves both answers of a guided step."""
    parts = _parts(zoo / "QwenImage")
    config = parts["transformer"].config
    names = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
    sizes = {name: config[name] for name in (*names, "joint_attention_dim", "axes_dims_rope")}
    parts["controlnet"] = _shaken(QwenImageControlNetModel(num_layers=1, **sizes))
    call = {"height": 32, "width": 32, "true_cfg_scale": 4.0, "negative_prompt": " "}
    return QwenImageControlNetPipeline(**parts), _items(32, picture="control_image"), call


def _sana(zoo: Path) -> Made:
    parts = _deeper(_parts(zoo / "Sana"))
    config = parts["transformer"].config
    names = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads")
    wide = ("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "sample_size")
    parts["controlnet"] = _shaken(SanaControlNetModel(num_layers=1, **{n: config[n] for n in (*names, *wide)}))
    call = {"use_resolution_binning": False, "complex_human_instruction": None}
    call |= {"height": 32, "width": 32, "max_sequence_length": 16}
    return SanaControlNetPipeline(**parts), _items(32, picture="control_image"), call


def _adapter(zoo: Path) -> Made:
    """What it says of one picture serves two prompts as it is, and of two items each has its own."""
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    changes = {"attention_head_dim": 2, "down_block_types": down, "up_block_types": up}
    parts = _without(_parts(zoo / "StableDiffusion", channels=4, **changes), "image_encoder")
    parts["adapter"] = _shaken(T2IAdapter(channels=[4, 8], num_res_blocks=2, downscale_factor=2))
    pipeline = StableDiffusionAdapterPipeline(**parts, requires_safety_checker=False)
    return pipeline, _items(32), {"height": 32, "width": 32}


def _fun(zoo: Path) -> Made:
    pipeline = CogVideoXFunControlPipeline(**_parts(zoo / "CogVideoX", channels=8))
    call = {"height": 16, "width": 16, "max_sequence_length": 16}
    return pipeline, _items(16, picture="control_video", frames=8), call


def _upscaler(zoo: Path) -> Made:
    """Of no prompt; its picture is scaled together with the sample."""
    small = {"block_out_channels": (4, 8), "norm_num_groups": 2}
    encoder: Any = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks: Any = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = _shaken(UNet2DModel(sample_size=16, in_channels=6, out_channels=3, layers_per_block=1, **small, **blocks))
    vqvae = _shaken(VQModel(latent_channels=3, **small, **encoder))
    parts = {"vqvae": vqvae, "unet": unet, "scheduler": _parts(zoo / "DDIM")["scheduler"]}
    items = [{"image": item["image"]} for item in _items(32)]
    return LDMSuperResolutionPipeline(**parts), items, {}


def _depth(zoo: Path) -> Made:
    """Its first sample is its picture under the noise of the first time, also at strength 1."""
    parts = _without(_parts(zoo / "StableDiffusion", channels=5, attention_head_dim=2), "image_encoder")
    sizes: Any = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = DPTConfig(image_size=32, patch_size=4, is_hybrid=False, **small, **sizes)
    parts["depth_estimator"] = DPTForDepthEstimation(config).eval()
    parts["feature_extractor"] = DPTImageProcessor(size={"height": 32, "width": 32})
    return StableDiffusionDepth2ImgPipeline(**_without(parts, "safety_checker")), _items(32), {}


def _replaced(_zoo: Path) -> Made:
    """All frames but the first are stepped, and each begins with a trace of the picture."""
    parts = zoo_image.load("HunyuanVideoImageToVideo").components
    own = {**parts["transformer"].config, "in_channels": 4, "image_condition_type": "token_replace"}
    parts["transformer"] = _shaken(type(parts["transformer"]).from_config(own))
    return HunyuanVideoImageToVideoPipeline(**parts), _items(16), zoo_image.call_of("HunyuanVideoImageToVideo")


def _wide(**changes: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "out_channels": 16, "text_dim": 32, "ffn_dim": 32}
    return {**sizes, "num_layers": 2, "rope_max_seq_len": 32, **changes}


def _vace(zoo: Path) -> Made:
    parts = _without(_parts(zoo / "Wan"), "expand_timesteps")
    parts["transformer"] = _shaken(WanVACETransformer3DModel(**_wide(num_layers=3, vace_layers=[0, 2])))
    return WanVACEPipeline(**parts), _items(16, picture="video", frames=9), _VIDEO


def _first_frame(kind: Any, network: Any, frames: int) -> Made:
    parts = _without(zoo_image.load("WanFirstLastFrame").components, "boundary_ratio", "expand_timesteps")
    parts = _without(parts, "transformer_2")
    parts["transformer"] = _shaken(network(**_wide(in_channels=36, image_dim=4)))
    return kind(**parts), _items(16), {**_VIDEO, "num_frames": frames}


def _chrono(_zoo: Path) -> Made:
    return _first_frame(ChronoEditPipeline, ChronoEditTransformer3DModel, 5)


def _skyreels(_zoo: Path) -> Made:
    return _first_frame(SkyReelsV2ImageToVideoPipeline, SkyReelsV2Transformer3DModel, 9)


def _fibo(zoo: Path) -> Made:
    """Of guided calls alone it masks what fills the shorter of two texts, among other arguments' options."""
    small: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids: Any = {"vocab_size": 128003, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    halvings: Any = {"dim_mult": [1] * 5, "temperal_downsample": [False, False, True, True]}
    wide: Any = {"joint_attention_dim": 32, "text_encoder_dim": 16, "axes_dims_rope": [4, 2, 2]}
    heads: Any = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1}
    pipeline = BriaFiboEditPipeline(
        transformer=_shaken(BriaFiboTransformer2DModel(in_channels=16, **heads, **wide)),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_shaken(AutoencoderKLWan(base_dim=8, num_res_blocks=1, **halvings)),
        text_encoder=_shaken(SmolLM3ForCausalLM(SmolLM3Config(**small, **ids))),
        tokenizer=_parts(zoo / "QwenImage")["tokenizer"],
    )
    items = [{**item, "prompt": json.dumps({"edit_instruction": item["prompt"]})} for item in _items(64)]
    return pipeline, items, {"height": 64, "width": 64, "_auto_resize": False}


MADE = [_flux, _sd3, _qwen, _sana, _adapter, _fun, _vace, _chrono, _skyreels, _upscaler, _depth, _replaced, _fibo]


@pytest.mark.parametrize("made", MADE)
def test_more_pipelines_are_recorded_and_proven_and_their_students_planned(
    made: Callable[[Path], Made], zoo: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline, items, call = made(zoo)
    pipeline.set_progress_bar_config(disable=True)
    recording = proven(pipeline, items, **call)
    assert recording.told is not None and recording.told.pictures and not recording.told.untold
    for steps in (1, 2):
        assert plan_student(recording, steps, renoise="ode").steps == steps
