"""A single file is a teacher where its configuration is here; else one line says how it becomes a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny_pipelines import tiny_stable_diffusion

import fewstep
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.fashion import teacher_path
from fewstep.programs.distillation import distill
from fewstep.teachers.loading import load_teacher

CALL = {"prompt": "the cat", "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in a folder with the configuration of its pipeline, and no other weights."""
    folder = tmp_path_factory.mktemp("cats-xl")
    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    return write_single_file(pipeline, folder / "cats_v3.safetensors")


def test_a_file_beside_its_configuration_is_the_pipeline(beside: Path):
    loaded, expected = load_teacher(str(beside)), tiny_stable_diffusion()
    for name in ("unet", "vae", "text_encoder"):
        weights = getattr(loaded, name).state_dict()
        assert all(weights[key].equal(value) for key, value in getattr(expected, name).state_dict().items())
    images = [pipe(**CALL, generator=torch.Generator().manual_seed(0)).images for pipe in (loaded, expected)]
    assert (images[0] == images[1]).all()


def test_it_is_distilled_and_its_student_is_called_by_it(beside: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n")
    run = {"max_steps": 1, "batch_size": 1, "steps": 1, "prompts": str(prompts), "report_to": "none", "cpu": True}
    folder = distill(str(beside), method="dmd2", out=str(tmp_path / "run"), **run)
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["base_model"] == "cats_v3" and str(beside.parent) not in (folder / "fewstep.json").read_text()
    assert fewstep.load(folder)("the cat", output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.soak
def test_a_plan_reads_the_configuration_alone(beside: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(beside), "dmd2", "--prompts", "none"]) == 0
    assert "StableDiffusionPipeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("model.diffusion_model.out.2.bias", "lacks weights of a network that its configuration in .* has"),
        ("first_stage_model.decoder.conv_in.bias", "lacks weights of a network that its configuration in .* has"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"does not hold the whole text_encoder: .*final_layer_norm.bias is missing",
        ),
    ],
)
def test_a_file_that_lacks_weights(gone: str, words: str, beside: Path, tmp_path: Path):
    shutil.copytree(beside.parent, tmp_path / "teacher")
    path = tmp_path / "teacher" / beside.name
    tensors = load_file(path)
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(UserError, match=words):
        load_teacher(str(path))


def test_without_a_configuration_two_lines_say_how(beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = Path(shutil.copy(beside, tmp_path / "cats.safetensors"))
    assert main(["probe", str(path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    code = line.partition("import diffusers; ")[2]
    assert f"from_single_file({str(path)!r}" in code and ".save_pretrained(" in code
    compile(code, "advice", "exec")


@pytest.mark.parametrize("name", ["cats.ckpt", "cats.bin", "cats.gguf"])
def test_other_files_are_not_opened(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"not looked at")
    with pytest.raises(UserError, match="is no safetensors file, and others are not opened"):
        load_teacher(str(tmp_path / name))


def test_what_is_no_pipeline(tmp_path: Path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"12345678901234567890")
    with pytest.raises(UserError, match="cannot be read"):
        load_teacher(str(broken))
    with pytest.raises(UserError, match=r"is not on this machine|lacks"):
        load_teacher(str(teacher_path("fashion-sd") / "unet" / "diffusion_pytorch_model.safetensors"))
