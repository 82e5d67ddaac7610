"""A teacher that was saved without one of its parts, and its student, load wherever they are named."""

import copy
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Img2ImgPipeline
from tiny_pipelines import tiny_flow

import fewstep
from fewstep.eval.models import student_model, teacher_model
from fewstep.eval.sample import sample
from fewstep.export import export_student, plan_student
from fewstep.recording import record
from fewstep.teachers.loading import load_teacher
from fewstep.teachers.weights import load_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Stable Diffusion 3 without its T5, and a student of it."""
    root = tmp_path_factory.mktemp("without")
    pipeline = tiny_flow()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(root / "teacher")
    recording = record(pipeline, prompt="the cat", guidance_scale=4.0)
    student = export_student(
        recording,
        copy.deepcopy(recording.network),
        plan_student(recording, 2),
        root / "student",
        method="dmd2",
        base_model=str(root / "teacher"),
    )
    return root / "teacher", student


def test_the_teacher_loads_without_them(folders: tuple[Path, Path]) -> None:
    for load in (load_pipeline, load_teacher, lambda place: teacher_model(place).load("cpu", None)):
        loaded = load(str(folders[0]))
        assert loaded.text_encoder_3 is None and loaded.transformer is not None
    other = load_pipeline(folders[0], StableDiffusion3Img2ImgPipeline)
    assert isinstance(other, StableDiffusion3Img2ImgPipeline) and other.text_encoder_3 is None


def test_the_student_is_sampled_and_evaluated_without_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, student = folders
    assert fewstep.load(student).text_encoder_3 is None
    assert student_model(student).load("cpu", None).text_encoder_3 is None
    assert sample(student, prompt="the cat", out=tmp_path / "cat.png", device="cpu").is_file()
