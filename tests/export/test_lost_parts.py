"""Teachers whose network has weights that its class does not load again: an IP-Adapter's, a LoRA's, fused ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from item_sets import picture
from peft import LoraConfig
from tiny_pipelines import tiny_stable_diffusion
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from fewstep.errors import UserError
from fewstep.export import ExportError, export_student, plan_student
from fewstep.export.lora import export_lora
from fewstep.export.lost_parts import lost_weights
from fewstep.export.student import Student
from fewstep.programs.distillation import distill
from fewstep.recording import Recording, record

SHORT = {"steps": 2, "max_steps": 1, "batch_size": 1, "cpu": True, "report_to": "none", "sample_steps": 0}
ITEMS = [{"prompt": prompt, "ip_adapter_image": picture(seed)} for seed, prompt in enumerate(("the cat", "a"))]


def _adapter(unet: Any) -> dict[str, dict[str, Tensor]]:
    """The weights of an IP-Adapter of this network, as they are published."""
    width, generator = unet.config.cross_attention_dim, torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    crossing = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        inner = unet.get_submodule(name).to_k.out_features
        for kind in "kv":
            state[f"{2 * number + 1}.to_{kind}_ip.weight"] = torch.randn(inner, width, generator=generator)
    shown = {"proj.weight": torch.randn(4 * width, 8, generator=generator), "proj.bias": torch.zeros(4 * width)}
    return {
        "image_proj": {**shown, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": state,
    }


def _load(pipeline: Any) -> None:
    how: dict[str, Any] = {"subfolder": "", "weight_name": "", "image_encoder_folder": None}
    pipeline.load_ip_adapter(_adapter(pipeline.unet), **how)


def _with_ip_adapter() -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)
        )
    parts = {**tiny_stable_diffusion().components, "image_encoder": encoder.eval()}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    _load(pipeline)
    return pipeline


@functools.lru_cache(maxsize=1)
def _recorded() -> Recording:
    return record(_with_ip_adapter(), items=ITEMS)


def _ip(unet: Any) -> None:
    unet._load_ip_adapter_weights([_adapter(unet)])


def _lora(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def _fused(unet: Any) -> None:
    unet.fuse_qkv_projections()


@pytest.mark.parametrize("change", [_ip, _lora, _fused])
def test_what_is_lost_is_what_a_save_and_a_load_leave_out(change: Callable[[Any], None], tmp_path: Path) -> None:
    unet = copy.deepcopy(tiny_stable_diffusion().unet)
    assert lost_weights(unet) == [] and lost_weights(nn.Linear(2, 2)) == []
    change(unet)
    unet.save_pretrained(tmp_path)
    loaded = {name for name, _ in type(unet).from_pretrained(tmp_path).named_parameters()}
    assert set(lost_weights(unet)) == {name for name, _ in unet.named_parameters()} - loaded != set()


def test_a_teacher_with_an_ip_adapter_is_refused_before_training(tmp_path: Path) -> None:
    """A full student was refused after its training; a LoRA was written, whose card's code raised an error."""
    pipeline = _recorded().pipeline
    with pytest.raises(UserError) as refused:
        distill(pipeline, "dmd2", items=ITEMS, out=tmp_path / "run", lora_rank=2, **SHORT)
    line = str(refused.value)
    assert line.startswith("the unet of StableDiffusionPipeline has weights that its class does not load again (")
    assert "to_k_ip.0.weight" in line and "unload_ip_adapter()" in line and "\n" not in line
    assert not list(tmp_path.glob("run/*/*")) and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert pipeline.unet.encoder_hid_proj is not None  # it stays as it is


def test_every_form_and_every_export_refuses_it(tmp_path: Path) -> None:
    recording, out = _recorded(), tmp_path / "student"
    plan, told = plan_student(recording, 2), {"method": "dmd2", "base_model": "t"}
    role: Any = None  # nothing is asked of it
    for refused in (
        lambda: Student.of(recording, plan).refuse_unwritable(lora=False, merge=False),
        lambda: export_student(recording, recording.network, plan, out, **told),
        lambda: export_lora(recording, role, plan, out, **told),
    ):
        with pytest.raises(ExportError, match="does not load again"):
            refused()
    assert not out.exists()


def test_the_students_of_the_pipeline_without_it_take_it(tmp_path: Path) -> None:
    """As the line says: unloaded, distilled, saved, loaded by stock diffusers, and loaded again."""
    pipeline = _with_ip_adapter()
    encoder, extractor = pipeline.image_encoder, pipeline.feature_extractor
    pipeline.unload_ip_adapter()
    recording = record(pipeline, prompt="the cat")
    plan = plan_student(recording, 2)
    export_student(recording, recording.network, plan, tmp_path / "student", method="dmd2", base_model="t")
    parts = {"image_encoder": encoder, "feature_extractor": extractor}
    student: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "student", **parts)
    student.set_progress_bar_config(disable=True)
    _load(student)
    seen = [
        student(**{**item, "prompt": "a"}, **plan.call, generator=torch.Generator().manual_seed(0), output_type="pt")
        for item in ITEMS
    ]
    assert (seen[0].images - seen[1].images).abs().max() > 1e-3
