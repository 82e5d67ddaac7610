"""In which precision a trained network is written, and that what was written is checked as what it is."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_flow, tiny_stable_diffusion

from fewstep.export import ExportError, export_student, plan_student
from fewstep.export.precision import as_computed, as_written
from fewstep.programs.distillation import distill
from fewstep.recording import record

ABOUT = {"method": "dmd2", "base_model": "example/teacher"}


def weights(folder):
    (path,) = Path(folder).glob("*.safetensors")
    return path


def stored(folder):
    return {value.dtype for value in load_file(weights(folder)).values()}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def recording(request, tmp_path_factory):
    """A teacher with a folder, in memory in one dtype or another, whose files are float16 but for one tensor."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_stable_diffusion().save_pretrained(folder)
    path = weights(folder / "unet")
    state = {name: value.half() if name != "conv_in.bias" else value for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    return record(DiffusionPipeline.from_pretrained(folder, dtype=request.param), prompt="the cat")


@pytest.mark.parametrize(
    "asked", [None, "bfloat16", *(pytest.param(name, marks=pytest.mark.soak) for name in ("float32", "float16"))]
)
def test_the_network_is_written_as_asked_else_as_the_teachers_files(recording, trained, tmp_path, asked):
    network = trained(recording).float()
    plan = plan_student(recording, 1, renoise="ode")
    folder = export_student(recording, network, plan, tmp_path / "student", export_dtype=asked, **ABOUT)
    dtype = getattr(torch, asked or "float16")
    state = load_file(weights(folder / "unet"))
    kept = {"conv_in.bias": torch.float32} if asked is None else {}
    assert {name: value.dtype for name, value in state.items()} == {name: kept.get(name, dtype) for name in state}
    assert all(torch.equal(value, network.state_dict()[key].to(value.dtype)) for key, value in state.items())
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}, "the student itself stays"
    assert DiffusionPipeline.from_pretrained(folder).unet.dtype == torch.float32


def test_a_teacher_from_no_folder_has_its_precision_in_memory(recorded, trained, tmp_path):
    recording = recorded("stable_diffusion")
    folder = export_student(recording, trained(recording), plan_student(recording, 1), tmp_path / "student", **ABOUT)
    assert stored(folder / "unet") == {torch.float32}


def test_fewer_bits_than_16_in_the_files_are_nothing_to_write_in(trained, tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path / "teacher")
    path = weights(tmp_path / "teacher" / "unet")
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in load_file(path).items()}, path)
    recording = record(tiny_stable_diffusion(), prompt="the cat")
    recording.pipeline.unet.register_to_config(_name_or_path=str(path.parent))
    (written,) = as_written(recording, {"unet": trained(recording)}, None).values()
    assert {value.dtype for value in written.state_dict().values()} == {torch.float32}


def test_a_network_that_is_right_already_is_not_copied(recorded, trained):
    recording = recorded("stable_diffusion")
    network = trained(recording)
    written = as_written(recording, {"unet": network}, "float32")
    assert written["unet"] is network and as_computed(recording, written)["unet"] is network


def test_the_check_compares_with_the_rounded_numbers(recorded, trained):
    recording = recorded("stable_diffusion")
    network = trained(recording)
    written = as_written(recording, {"unet": network}, "bfloat16")
    computed = as_computed(recording, written)["unet"].state_dict()
    for name, value in network.state_dict().items():
        assert computed[name].dtype == torch.float32
        assert torch.equal(computed[name], value.bfloat16().float())


def test_a_number_that_the_precision_cannot_hold_is_refused(recorded, trained, tmp_path):
    recording = recorded("stable_diffusion")
    network = trained(recording)
    with torch.no_grad():
        network.conv_in.bias[0] = 1e5
    plan = plan_student(recording, 1, renoise="ode")
    with pytest.raises(ExportError, match=r"conv_in\.bias that float16 cannot hold: give --export_dtype bfloat16"):
        export_student(recording, network, plan, tmp_path / "student", export_dtype="float16", **ABOUT)
    assert not (tmp_path / "student").exists()
    folder = export_student(recording, network, plan, tmp_path / "student", export_dtype="bfloat16", **ABOUT)
    assert json.loads((folder / "fewstep.json").read_text())["method"] == "dmd2"


def test_an_added_module_is_held_against_what_lies_in_its_files(tmp_path):
    tiny_flow().to(torch.float16).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    run = {"steps": 2, "max_steps": 2, "batch_size": 2, "num_pairs": 4, "pair_steps": 2, "lr": 0.1, "sample_steps": 0}
    run |= {"report_to": "none", "cpu": True, "guidance_scale": 3.0, "call": {"max_sequence_length": 8}}
    prompts = str(tmp_path / "prompts.txt")
    folder = distill(str(tmp_path / "teacher"), "mean_flow", out=str(tmp_path / "out"), prompts=prompts, **run)
    assert stored(folder / "second_time") == {torch.float16}  # so large a rate that rounding shows in the answers
