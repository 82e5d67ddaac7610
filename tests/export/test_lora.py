"""LoRA students: stock diffusers loads what was trained, and what does not fit is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lora_students import answers, export, fresh, write_style
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipelines import tiny_stable_diffusion
from toys import adapter_role

import fewstep
from fewstep.export import ExportError, apply, export_lora, export_student, load, loads_lora, lora, plan_student
from fewstep.export.apply import LORA_FILE
from fewstep.export.load import base_of
from fewstep.export.lora_names import BARE, KOHYA
from fewstep.fashion import teacher_path
from fewstep.networks.adapters import Backbone


@pytest.mark.parametrize("name", ["stable_diffusion", "flow"])
def test_an_applied_lora_is_the_role_that_was_trained(recorded, tmp_path, name):
    recording = recorded(name)
    role, folder = export(recording, tmp_path / "lora")
    stock = type(recording.pipeline)
    pipeline = apply(fresh(recording), folder)
    assert isinstance(pipeline, stock) and type(pipeline) is not stock
    with role.denoiser.active():
        expected = answers(recording, role.denoiser.network)
    found = answers(recording, getattr(pipeline, recording.component))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if name == "stable_diffusion":  # a fresh transformer's last layer is zero
        assert not torch.allclose(found, answers(recording, recording.network), rtol=1e-2, atol=1e-2)
    calls = []
    getattr(pipeline, recording.component).register_forward_hook(lambda *_: calls.append(1))
    pipeline("the cat", output_type="np")
    assert len(calls) == 2
    assert type(pipeline.scheduler).__name__ == pipeline.fewstep["scheduler"]


def test_folder_and_file_describe_themselves(recorded, tmp_path):
    recording = recorded("stable_diffusion")
    role, folder = export(recording, tmp_path / "lora")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {LORA_FILE, "README.md", "fewstep.json", "scheduler/scheduler_config.json"}
    assert files == own | {KOHYA.file, BARE.file}
    about = json.loads((folder / "fewstep.json").read_text())
    lora = {"file": LORA_FILE, "rank": 4, "alpha": 4, "adapter": "student", "network": "UNet2DConditionModel"}
    assert about["lora"] == lora
    assert about["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    with safe_open(folder / LORA_FILE, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert json.loads(metadata["fewstep"]) == about
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 4)
    assert keys == {f"unet.{name}" for name in role.weights.state_dict()}
    from huggingface_hub.repocard import metadata_load

    front = metadata_load(folder / "README.md")
    assert front["base_model_relation"] == "adapter" and "lora" in front["tags"]


def test_a_file_that_loads_otherwise_is_not_left_behind(recorded, tmp_path, monkeypatch):
    save = lora.save_file

    def weaker(state, path, metadata):
        save({key: value / 2 if "lora_B" in key else value for key, value in state.items()}, path, metadata)

    def fewer(state, path, metadata):
        first = next(iter(state)).removesuffix(".lora_A.weight")
        save({key: value for key, value in state.items() if not key.startswith(first)}, path, {"format": "pt"})

    def half(state, path, metadata):
        save(dict(list(state.items())[1:]), path, metadata)

    def broken(state, path, metadata):
        save({f"other.{key}": value for key, value in state.items()}, path, metadata)

    refusals = {weaker: "is not what was trained, in unet", half: "is not what was trained, in unet"}
    refusals |= {fewer: "loads into other layers", broken: "does not load"}
    for damage, refusal in refusals.items():
        monkeypatch.setattr(lora, "save_file", damage)
        with pytest.raises(ExportError, match=refusal):
            export(recorded("stable_diffusion"), tmp_path / "lora")
        assert not list(tmp_path.iterdir())


def test_the_recorded_pipeline_stays_as_it_was(recorded, tmp_path):
    recording = recorded("stable_diffusion")
    before = recording.pipeline.scheduler, recording.pipeline.unet, set(recording.network.state_dict())
    export(recording, tmp_path / "lora")
    after = recording.pipeline.scheduler, recording.pipeline.unet, set(recording.network.state_dict())
    assert before[0] is after[0] and before[1] is after[1] and before[2] == after[2]


@pytest.mark.parametrize(("name", "renoise"), [("stable_diffusion", "fresh"), ("flow", "ode")])
def test_the_code_on_the_card_runs_and_agrees(recorded, tmp_path, name, renoise):
    recording = recorded(name)
    base = tmp_path / "base"
    fresh(recording).save_pretrained(base)
    _, folder = export(recording, tmp_path / "lora", renoise=renoise)
    style = write_style(recording, tmp_path / "style.safetensors")
    images, scope = [], {}
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S):
        code = code.replace("path/to/this/folder", str(folder)).replace("example/teacher", str(base))
        code = code.replace("path/to/style.safetensors", str(style))
        if "fewstep" in code:
            code = "import torch\n" + code.replace(").images", ", generator=torch.Generator().manual_seed(0)).images")
        exec(code, scope)
        images.append(np.asarray(scope["image"]))
    assert len(images) == 3 and np.array_equal(*images[:2])
    assert scope["pipe"].get_active_adapters() == ["student", "style"]


@pytest.mark.parametrize(("name", "renoise"), [("stable_diffusion", "fresh"), ("flow", "ode")])
def test_the_card_says_of_steps_and_seeds_what_a_whole_students_says(recorded, tmp_path, name, renoise):
    recording = recorded(name)
    _, folder = export(recording, tmp_path / "lora", renoise=renoise)
    plan = plan_student(recording, 2, renoise=renoise)
    whole = export_student(recording, recording.network, plan, tmp_path / "whole", method="dmd2", base_model="a/b")

    def told(student):
        card = (student / "README.md").read_text()
        return [re.search(rf"## {heading}\n.*?(?=\n## )", card, re.S)[0] for heading in ("Steps", "Seeds")]

    assert told(folder) == told(whole)
    assert ("Other samplers" in told(folder)[0]) == (renoise == "fresh")


def test_a_moved_lora_is_not_put_onto_an_embedded_teacher_for_its_bases_name(recorded, tmp_path, monkeypatch):
    recording = recorded("stable_diffusion")
    base = tmp_path / "mine" / "fashion-sd"
    fresh(recording).save_pretrained(base)
    _, folder = export(recording, tmp_path / "lora", base_model=str(base))
    about = json.loads((folder / "fewstep.json").read_text())
    with pytest.raises(ExportError, match=r"does not lie here under that name: say where \(--base DIR\)"):
        base_of(folder, about)
    assert base_of(folder, about, base) == str(base)
    monkeypatch.chdir(tmp_path / "mine")
    assert Path(base_of(folder, about)).resolve() == base
    (tmp_path / "config.yaml").write_text("teacher: fashion-sd")
    assert base_of(folder, about) == str(teacher_path("fashion-sd"))


def test_networks_that_diffusers_cannot_load_a_lora_into_are_known(recorded):
    loading = {name: loads_lora(recorded(name).network) for name in ("ddim", "dit", "stable_diffusion", "flow")}
    assert loading == {"ddim": False, "dit": False, "stable_diffusion": True, "flow": True}


# --- bad input --------------------------------------------------------------------------------------------------------


def message(pipeline, folder) -> str:
    before = type(pipeline), pipeline.scheduler
    with pytest.raises(ExportError) as caught:
        apply(pipeline, folder)
    assert before == (type(pipeline), pipeline.scheduler)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_lora_of_another_model_is_refused_and_the_pipeline_stays(recorded, tmp_path):
    _, unet = export(recorded("stable_diffusion"), tmp_path / "unet")
    _, flow = export(recorded("flow"), tmp_path / "flow")
    pipeline = fresh(recorded("stable_diffusion"))
    assert "is for the transformer of example/teacher" in message(pipeline, flow)
    smaller = type(pipeline.unet).from_config({**pipeline.unet.config, "cross_attention_dim": 12})
    pipeline.register_modules(unet=smaller)
    assert re.search(r"does not fit this unet: \S+to_k is \(\d+, 12\) here", message(pipeline, unet))
    shallow = {**pipeline.unet.config, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    pipeline.register_modules(unet=type(smaller).from_config(shallow))
    assert "it has no down_blocks.1.attentions" in message(pipeline, unet)
    assert not any("lora" in name for name in pipeline.unet.state_dict())


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_lora_file_that_lacks_a_layer_is_refused(recorded, tmp_path, factor):
    """PEFT makes the layer all the same, as it is before any training."""
    _, folder = export(recorded("stable_diffusion"), tmp_path / "lora")
    with safe_open(folder / LORA_FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    del tensors[next(key for key in tensors if factor in key)]
    save_file(tensors, folder / LORA_FILE, metadata)
    assert re.search(rf"is damaged: it lacks the {factor} of \S+", message(fresh(recorded("stable_diffusion")), folder))


def test_what_is_no_lora_is_refused(recorded, trained, tmp_path):
    recording = recorded("stable_diffusion")
    pipeline = fresh(recording)
    assert "there is no folder" in message(pipeline, tmp_path / "nowhere")
    assert "hub" in message(pipeline, "owner/name")  # offline
    whole = export_student(
        recording, trained(recording), plan_student(recording, 1), tmp_path / "w", method="dmd2", base_model="a/b"
    )
    assert "load it with fewstep.load" in message(pipeline, whole)
    _, folder = export(recording, tmp_path / "lora")
    with pytest.raises(ExportError, match="example/teacher does not load"):  # offline
        load(folder)
    with pytest.raises(ExportError, match="has no base model; leave the base out"):
        load(whole, base="example/teacher")
    assert "student already" in message(fewstep.apply(pipeline, folder), folder)
    damaged = tmp_path / "lora" / LORA_FILE
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert "cannot be read" in message(fresh(recording), folder)
    damaged.unlink()
    assert f"no {LORA_FILE}" in message(fresh(recording), folder)


def test_a_hub_id_fetches_three_files(recorded, tmp_path, monkeypatch):
    recording = recorded("stable_diffusion")
    _, folder = export(recording, tmp_path / "lora")
    asked = []

    def fetch(repository, name):
        asked.append((repository, name))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    pipeline = apply(fresh(recording), "owner/name")
    assert {name for _, name in asked} == {"fewstep.json", LORA_FILE, "scheduler/scheduler_config.json"}
    assert pipeline.fewstep["steps"] == 2


def test_a_teacher_in_half_precision_gives_a_lora_in_float32(tmp_path):
    recording = fewstep.record(tiny_stable_diffusion().to(dtype=torch.bfloat16), prompt="the cat")
    role = adapter_role("student", Backbone(recording.network, 4, 8), recording)
    folder = export_lora(
        recording, role, plan_student(recording, 1), tmp_path / "lora", method="dmd2", base_model="example/teacher"
    )
    with safe_open(Path(folder) / LORA_FILE, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118
    assert isinstance(apply(fresh(recording).to(dtype=torch.bfloat16), folder), DiffusionPipeline)
