"""What a run says when it starts, what its sample grids show, and what its card asks for."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from tiny_pipelines import tiny_dit, tiny_stable_diffusion
from transformers import CLIPConfig, CLIPImageProcessor

from fewstep.cli import main
from fewstep.config.pairs import PairsConfig
from fewstep.config.run import RunConfig
from fewstep.eval import evaluate
from fewstep.programs.distillation import distill
from fewstep.programs.methods import method_class, methods
from fewstep.programs.teacher import TeacherSettings
from fewstep.trainers._consistency_config import ConsistencyConfig
from fewstep.trainers._mean_flow_config import MeanFlowConfig
from fewstep.training.distributed import samples_line

RUN = {"steps": 1, "max_steps": 1, "batch_size": 2, "sample_steps": 1, "report_to": "none", "cpu": True, "lora_rank": 2}
PROMPT = 'a "boot" of Ångström'


def prudish(pipeline):
    """The same with a checker that blackens every picture."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-10)
    pipeline.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    return pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prudish")
    prudish(tiny_stable_diffusion()).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text(f"{PROMPT}\na cat\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    words = {"prompts": str(teacher / "prompts.txt"), "out": str(teacher / "run"), "merge": True}
    return distill(teacher / "teacher", "dmd2", **RUN, **words)


def brightness(grid: Path) -> list[float]:
    """Of the rows' pictures."""
    with Image.open(grid) as picture:
        pixels = np.asarray(picture.convert("L"))
    return [float(np.median(half)) for half in np.array_split(pixels, 2)]


def test_sample_grids_go_around_the_safety_checker(student: Path, teacher: Path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(student)
    black = pipeline("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert not black.any() and pipeline.safety_checker is not None  # who is given the student still has it
    assert min(brightness(teacher / "run" / "samples" / "step_00000001.png")) > 20
    evaluate([student], out=teacher / "report", num=2, batch_size=2, steps=(1,), prompts=str(teacher / "prompts.txt"))
    assert min(brightness(teacher / "report" / "grid.png")) > 20


def test_the_card_asks_for_a_prompt_of_the_run(student: Path):
    assert json.loads((student / "fewstep.json").read_text(encoding="utf-8"))["example"] == PROMPT
    for form in (student, student.with_name("student_lora")):
        code = re.findall(r"```python\n(.*?)```", (form / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
        asked = [line for block in code for line in block.splitlines() if "boot" in line]
        assert len(asked) == 2 and all("photo of a cat" not in block for block in code)
        assert eval(asked[0].strip().rstrip(",")) == PROMPT


def test_the_card_asks_for_a_label_of_the_run(tmp_path: Path):
    distill(tiny_dit(), "dmd2", classes="7,3", out=str(tmp_path), **{**RUN, "sample_steps": 0})
    card = next(tmp_path.glob("student*/README.md")).read_text()
    assert card.count("class_labels=[7]") == 2


def test_a_run_says_its_processes_and_no_other_librarys_useless_lines(teacher: Path, tmp_path: Path, capfd, caplog):
    words = ["--teacher", str(teacher / "teacher"), "--prompts", str(teacher / "prompts.txt")]
    words += [f"--{name}={value}" for name, value in {**RUN, "gradient_accumulation_steps": 3}.items()]
    assert main(["distill", "dmd2", *words, "--out", str(tmp_path / "run")]) == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "fewstep"]
    assert lines[0] == "1 process on cpu, each with 2 samples x 3 micro-batches: 6 samples in a step"
    error = capfd.readouterr().err
    for useless in ("Loading", "Writing model shards", "Expected types", "non-standard module", "torch.jit.script"):
        assert useless not in error


@pytest.mark.parametrize(
    ("processes", "batch", "micro", "line"),
    [
        (1, 1, 1, "1 process on cpu, each with 1 sample: 1 sample in a step"),
        (8, 4, 1, "8 processes on cpu, each with 4 samples: 32 samples in a step"),
        (8, 64, 4, "8 processes on cpu, each with 64 samples x 4 micro-batches: 2,048 samples in a step"),
    ],
)
def test_the_line_counts_all_processes(processes: int, batch: int, micro: int, line: str):
    class Launch(Accelerator):
        num_processes = processes
        device = torch.device("cpu")

        def __init__(self) -> None:
            """A launch that was not started."""

    assert samples_line(Launch(), batch, micro) == line


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        (RunConfig(teacher="t", out="o", variant="fp16"), "fp16"),
        (ConsistencyConfig(teacher="t", out="o", variant="lcm"), None),
        (MeanFlowConfig(teacher="t", out="o", variant="improved"), None),
        (ConsistencyConfig(teacher="t", out="o", teacher_variant="fp16"), "fp16"),
        (MeanFlowConfig(teacher="t", out="o", teacher_variant="fp16"), "fp16"),
        (PairsConfig(teacher="t", out="o", num=1, variant="fp16"), "fp16"),
    ],
    ids=["any method", "consistency", "mean_flow", "consistency told", "mean_flow told", "pairs"],
)
def test_a_methods_own_variant_is_none_of_the_teachers_files(config: Any, variant: str | None):
    assert TeacherSettings.of(config).variant == variant


@pytest.mark.parametrize("method", methods())
def test_every_method_heeds_the_variant_of_its_teachers_files(method: str):
    config = method_class(method).Config
    told = {field.name: field for field in fields(config)}
    own = told["variant"].default is not None  # a paper's
    assert ("teacher_variant" in told) == own, "a flag beside --variant hides it"
    needed = {"data": "images"} if method == "flash_dmd" else {}
    settings = config(teacher="t", out="o", **needed, **{"teacher_variant" if own else "variant": "fp16"})
    assert TeacherSettings.of(settings).variant == "fp16"
