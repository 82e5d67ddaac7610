"""What a student says of its teacher's files, and where that leads: its card's code, fewstep.load, fewstep eval."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from single_file import write_single_file
from tiny_pipelines import tiny_stable_diffusion

import fewstep
from fewstep.eval.models import student_model, teacher_model
from fewstep.export.errors import ExportError
from fewstep.programs.distillation import distill

RUN: dict[str, Any] = {"max_steps": 1, "batch_size": 1, "steps": 1, "report_to": "none", "cpu": True, "lora_rank": 2}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n")
    return str(path)


def _half(folder: Path) -> Path:
    """A pipeline whose weights are there in one variant alone."""
    tiny_stable_diffusion().save_pretrained(folder, variant="fp16")
    return folder


def _loading_line(folder: Path) -> str:
    return re.search(r"^pipe = (.*)$", (folder / "README.md").read_text(), re.M)[1]


def test_a_lora_goes_onto_the_variant_inside_the_folder_it_was_trained_on(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _half(tmp_path / "cats" / "small")
    told = {"teacher": str(tmp_path / "cats"), "subfolder": "small"}
    folder = distill(told["teacher"], subfolder="small", out=str(tmp_path / "run"), prompts=prompts, **RUN)
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["base_model"] == "cats" and about["base_files"] == {"subfolder": "small", "variant": "fp16"}
    assert fewstep.load(folder).fewstep["steps"] == 1
    assert _loading_line(folder).startswith('DiffusionPipeline.from_pretrained("cats/small", variant="fp16"')
    monkeypatch.chdir(tmp_path)
    assert isinstance(eval(_loading_line(folder), {"DiffusionPipeline": DiffusionPipeline}), DiffusionPipeline)

    student = student_model(folder)
    assert student.pipeline_class().__name__ == "StableDiffusionPipeline"
    teacher = teacher_model(told["teacher"], students=[student])
    assert teacher.files == about["base_files"]
    for model in (student, teacher):
        assert model.load("cpu", None).unet is not None
    # Another base of the caller's is taken as it is.
    shutil.copytree(tmp_path / "cats" / "small", tmp_path / "elsewhere")
    assert fewstep.load(folder, base=tmp_path / "elsewhere").fewstep["steps"] == 1
    with pytest.raises(ExportError, match="no folder of a diffusers pipeline"):
        fewstep.load(folder, base=tmp_path)


@pytest.mark.soak
def test_a_lora_of_a_single_file(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_stable_diffusion().save_pretrained(tmp_path / "cats")
    file = write_single_file(tiny_stable_diffusion(), tmp_path / "cats" / "cats_v3.safetensors")
    folder = distill(str(file), out=str(tmp_path / "run"), prompts=prompts, **RUN)
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["base_model"] == "cats_v3" and about["base_files"] == {"file": "cats_v3.safetensors"}
    card = (folder / "README.md").read_text()
    assert "from diffusers import LCMScheduler, StableDiffusionPipeline" in card
    assert _loading_line(folder) == 'StableDiffusionPipeline.from_single_file("cats_v3.safetensors")'
    assert fewstep.load(folder).fewstep["steps"] == 1
    assert fewstep.load(folder, base=file).fewstep["steps"] == 1
    assert teacher_model(file).load("cpu", None).unet is not None
    assert student_model(folder).pipeline_class().__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({}, 'DiffusionPipeline.from_pretrained("some/teacher")'),
        ({"revision": "v2", "variant": "fp16"}, '("some/teacher", revision="v2", variant="fp16")'),
        (
            {"revision": "v2", "subfolder": "small", "variant": "fp16"},
            '(snapshot_download("some/teacher", revision="v2", allow_patterns="small/*") + "/small", variant="fp16")',
        ),
    ],
)
def test_the_cards_code_names_the_files_of_a_hub_id(told: dict[str, str], line: str):
    from fewstep.export.card.card import snippet

    pipeline = tiny_stable_diffusion()
    about = {
        "call": {"num_inference_steps": 1},
        "load": {},
        "conditional": "prompt",
        "component": "unet",
        "scheduler": "DDIMScheduler",
        "noise_follows": "generator",
        "lora": {"file": "a.safetensors"},
        "base_model": "some/teacher",
        "base_files": told,
    }
    code = snippet(about, pipeline)
    assert line in code and ("from huggingface_hub import snapshot_download\n" in code) == ("subfolder" in told)
    compile(code, "card", "exec")
