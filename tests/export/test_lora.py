"""LoRA students: stock diffusers loads what was trained, alpha and all, and refuses what does not fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from tiny_pipelines import tiny_stable_diffusion
from toys import adapter_role

import fewstep
from fewstep.export import ExportError, apply, export_lora, export_student, load, loads_lora, lora, plan_student
from fewstep.export.apply import LORA_FILE
from fewstep.export.load import base_of
from fewstep.fashion import teacher_path
from fewstep.networks.adapters import Backbone


def export(recording, out, steps=2, rank=4, alpha=8, renoise="auto", **more):
    """A LoRA whose adapter does something, with alpha apart from the rank."""
    role = adapter_role("student", Backbone(recording.network, rank, alpha), recording)
    more = {"method": "dmd2", "base_model": "example/teacher", **more}
    return role, export_lora(recording, role, plan_student(recording, steps, renoise=renoise), out, **more)


def fresh(recording):
    """The base model as a user loads it."""
    from fewstep.recording.pipeline import with_parts

    network = type(recording.network).from_config(recording.network.config)
    network.load_state_dict(recording.network.state_dict())
    return with_parts(recording.pipeline, **{recording.component: network.eval()})


def answers(recording, network):
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        timestep = recording.schedule.timestep(t)
        return recording.recipe.call(network, x, timestep, recording.condition(prompts=["a", "b"]))


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
    assert files == {LORA_FILE, "README.md", "fewstep.json", "scheduler/scheduler_config.json"}
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["lora"] == {"file": LORA_FILE, "rank": 4, "alpha": 8}
    assert about["call"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    with safe_open(folder / LORA_FILE, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert json.loads(metadata["fewstep"]) == about
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 8)
    assert keys == {f"unet.{name}" for name in role.weights.state_dict()}
    from huggingface_hub.repocard import metadata_load

    front = metadata_load(folder / "README.md")
    assert front["base_model_relation"] == "adapter" and "lora" in front["tags"]


def test_a_file_without_its_alpha_is_not_left_behind(recorded, tmp_path, monkeypatch):
    def forgetful(state, path, metadata):
        save(state, path, {"format": "pt"})

    save = lora.save_file
    monkeypatch.setattr(lora, "save_file", forgetful)
    with pytest.raises(ExportError, match="is not what was trained, in unet"):
        export(recorded("stable_diffusion"), tmp_path / "lora")
    assert not list(tmp_path.iterdir())
    export(recorded("stable_diffusion"), tmp_path / "lora", alpha=4)  # alpha = rank is what diffusers assumes


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
    images = []
    for code in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S):
        code = code.replace("path/to/this/folder", str(folder)).replace("example/teacher", str(base))
        if "fewstep" in code:
            code = "import torch\n" + code.replace(").images", ", generator=torch.Generator().manual_seed(0)).images")
        scope = {}
        exec(code, scope)
        images.append(np.asarray(scope["image"]))
    assert len(images) == 2
    assert np.array_equal(*images)


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


def test_a_stock_pipeline_saves_itself_with_no_word_of_fewstep(recorded, tmp_path):
    """An adapter that is loaded is saved by diffusers' own rules; what is written then is no student's folder."""
    recording = recorded("stable_diffusion")
    _, folder = export(recording, tmp_path / "lora")
    apply(fresh(recording), folder).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "fewstep.json").exists()
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


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
