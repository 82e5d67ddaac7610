"""LoRA files in other hands: every program's rule finds every layer, and what is loaded makes the same pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, WanTransformer3DModel
from diffusers.utils import convert_state_dict_to_kohya
from lora_readers import RULES
from lora_students import export, fresh, picture
from safetensors.torch import load_file, save_file

from fewstep.export import apply
from fewstep.export.apply import LORA_FILE
from fewstep.export.card.lora import sampling_elsewhere, simple_schedule
from fewstep.export.lora_names import DIFFUSION_MODEL, KOHYA, READERS, WAN, further_names
from fewstep.networks.adapters import attention_linears
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken

#: Tried whenever the zoo is there; the others are slow, and tried by `make soak`.
QUICK = ("QwenImage", "StableDiffusion", "Wan")
#: The files that diffusers reads as well, by its converters.
READ_BY_DIFFUSERS = (KOHYA, DIFFUSION_MODEL, WAN)


def families(config: pytest.Config) -> list:
    names = pipeline_folder.names(config, sample=False, short=False)
    known = [name for name in names if isinstance(name, str)]
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.soak) for n in known] or names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", families(metafunc.config))


def test_every_family_of_the_zoo_is_right_everywhere(zoo: Path, family: str, tmp_path: Path) -> None:
    """Pictures of what was trained, by diffusers and by every file that it reads; layers by every reader's rule."""
    pipeline = DiffusionPipeline.from_pretrained(zoo / family)
    network = pipeline_folder.denoiser(pipeline)
    if not hasattr(network, "load_lora_adapter"):
        pytest.skip(f"diffusers loads no LoRA into a {type(network).__name__}")
    call = pipeline_folder.call_of(zoo, family, pipeline)
    with shaken(network):
        recording = record(pipeline, **call)
        role, folder = export(recording, tmp_path / "lora", renoise="ode")
        base = fresh(recording)
        component, kind = recording.component, type(network).__name__
        about = json.loads((folder / "fewstep.json").read_text())
        condition = {name: call[name] for name in ("prompt", "class_labels") if name in call}

        student = apply(base, folder)
        found = picture(student, **condition)
        student.unload_lora_weights()
        with pytest.warns(UserWarning, match="this is not the student"):
            before = picture(student, **condition)  # the student's call and scheduler, and nothing trained
        for names in further_names(kind):
            assert (folder / names.file).is_file()
            if names in READ_BY_DIFFUSERS:
                student.load_lora_weights(str(folder), weight_name=names.file, adapter_name="student")
                np.testing.assert_allclose(picture(student, **condition), found, rtol=0, atol=1e-5)
                student.unload_lora_weights()
        student.register_modules(**{component: role.backbone.network})
        with role.denoiser.active():  # what was trained
            np.testing.assert_allclose(picture(student, **condition), found, rtol=0, atol=1e-5)
        assert np.abs(found - before).max() > 1e-3

    layers = set(attention_linears(network))
    card = (folder / "README.md").read_text()
    for program, names in READERS.get(kind, {}).items():
        file = LORA_FILE if names is None else names.file
        held = set(load_file(folder / file))
        assert RULES[program](held, kind, layers) == layers, f"{program} finds fewer in {file}"
        assert f"| {program} | `{file}` |" in card
    assert ("## In other programs" in card) == (kind in READERS)
    assert about["lora"]["alpha"] == about["lora"]["rank"] == 4


def test_the_rules_are_those_that_leave_layers_out(recorded, tmp_path: Path) -> None:
    """Known: of Stable Diffusion 1.5's 177 layers in PEFT's names ComfyUI finds 49, LyCORIS and DiffSynth none."""
    with torch.device("meta"):
        sizes = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 16}
        network = UNet2DConditionModel(**sizes, attention_head_dim=8)
    layers = set(attention_linears(network))
    assert len(layers) == 177
    peft = {f"unet.{path}.lora_{factor}.weight" for path in layers for factor in "AB"}
    found = {program: len(rule(peft, "UNet2DConditionModel", layers)) for program, rule in RULES.items()}
    assert found == {"ComfyUI": 49, "LyCORIS": 0, "DiffSynth-Studio": 0, "stable-diffusion.cpp": 0}
    pair = (torch.zeros(2, 3), torch.zeros(3, 2))
    kohya = set(KOHYA.state(dict.fromkeys(layers, pair)))
    assert len(kohya) == 3 * 177
    for program in ("ComfyUI", "LyCORIS", "stable-diffusion.cpp"):
        assert RULES[program](kohya, "UNet2DConditionModel", layers) == layers


def test_the_numbers_are_the_same_whatever_a_reader_takes_for_alpha(recorded, tmp_path: Path) -> None:
    """Trained with alpha twice the rank; readers that drop it, take the rank for it, or read it find one product."""
    recording = recorded("stable_diffusion")
    role, folder = export(recording, tmp_path / "lora", rank=4, alpha=8)
    diffusers, kohya = load_file(folder / LORA_FILE), load_file(folder / KOHYA.file)
    merged = role.stock_network()
    for path in role.backbone.targets:
        own = recording.network.get_submodule(path).weight
        change = merged.get_submodule(path).weight - own
        a, b = (diffusers[f"unet.{path}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(b @ a, change.detach(), rtol=1e-4, atol=1e-5)
        name = f"lora_unet_{path.replace('.', '_')}"
        assert kohya[f"{name}.alpha"].shape == () and float(kohya[f"{name}.alpha"]) == len(a)
        assert torch.equal(kohya[f"{name}.lora_up.weight"], b) and torch.equal(kohya[f"{name}.lora_down.weight"], a)
    # diffusers' own converter takes the rank for alpha, and save_lora_weights forgets it.
    converted = convert_state_dict_to_kohya({key.replace("unet.", "", 1): value for key, value in diffusers.items()})
    assert {float(value) for key, value in converted.items() if key.endswith("alpha")} == {4.0}
    student = apply(fresh(recording), folder)
    found = picture(student, prompt="the cat")
    student.load_lora_weights(str(folder))  # without a name: the one for diffusers among the files
    assert len(student.unet.peft_config) == 2
    type(student).save_lora_weights(tmp_path / "again", unet_lora_layers=_bare(diffusers))
    student.unload_lora_weights()
    student.load_lora_weights(str(tmp_path / "again"), adapter_name="student")
    np.testing.assert_allclose(picture(student, prompt="the cat"), found, rtol=0, atol=1e-5)


def _bare(state: dict) -> dict:
    return {key.removeprefix("unet."): value for key, value in state.items()}


def test_a_folder_of_an_older_version_still_loads(recorded, tmp_path: Path) -> None:
    """Its alpha stands in the file's metadata, its adapter has no name, and there is one file."""
    recording = recorded("stable_diffusion")
    _, folder = export(recording, tmp_path / "lora", rank=4, alpha=8)
    expected = picture(apply(fresh(recording), folder), prompt="the cat")
    state = load_file(folder / LORA_FILE)
    older = {key: value / 2 if "lora_B" in key else value for key, value in state.items()}
    config = {"r": 4, "lora_alpha": 8, "target_modules": sorted({key.rsplit(".", 2)[0][5:] for key in state})}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    save_file(older, folder / LORA_FILE, {"format": "pt", **metadata})
    about = json.loads((folder / "fewstep.json").read_text())
    about["lora"] = {"file": LORA_FILE, "rank": 4, "alpha": 8}
    (folder / "fewstep.json").write_text(json.dumps(about))
    (folder / KOHYA.file).unlink()
    np.testing.assert_allclose(picture(apply(fresh(recording), folder), prompt="the cat"), expected, rtol=0, atol=1e-5)


def test_each_network_of_several_has_a_file_under_each_name() -> None:
    assert WAN.file_of("transformer", "transformer") == WAN.file
    assert WAN.file_of("transformer_2", "transformer") == "lora_original_names_transformer_2.safetensors"
    names = [names for programs in READERS.values() for names in programs.values() if names is not None]
    assert len({names.file for names in names}) == len(set(map(id, names)))
    assert further_names("UNet2DConditionModel") and not further_names("SanaTransformer2DModel")


def test_wan_of_images_has_names_for_its_image_layers_too() -> None:
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, num_layers=1, ffn_dim=32, added_kv_proj_dim=24, image_dim=16
        )
    layers = {path for path in attention_linears(network) if path.startswith("blocks")}
    state = set(WAN.state(dict.fromkeys(layers, (torch.zeros(2, 3), torch.zeros(3, 2)))))
    assert any("cross_attn.k_img" in key for key in state)
    for program in READERS["WanTransformer3DModel"]:
        assert RULES[program](state, "WanTransformer3DModel", layers) == layers


def test_the_schedule_called_simple_is_named_where_it_visits_the_trained_times() -> None:
    table = [(4, [999, 749, 499, 249]), (2, [999, 499]), (1, [999]), (3, [999, 666, 333])]
    for count, timesteps in table:
        assert len(timesteps) == count and simple_schedule(timesteps, "epsilon") == 1.0
    for timesteps in ([999, 666, 333, 0], [999, 759, 499, 259], [750, 500, 250]):  # other schedules; a lower start
        assert simple_schedule(timesteps, "epsilon") is None
    for shift in (1.0, 3.0, 5.0):
        walk = [1000 * shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
        assert simple_schedule(walk, "flow") == pytest.approx(shift)
        assert simple_schedule([*walk[:2], walk[2] + 5, walk[3]], "flow") is None
    assert simple_schedule([1000.0], "flow") == 1.0 and simple_schedule([900.0], "flow") is None
    assert simple_schedule([999, 499], "edm") is None
    about = {"timesteps": [999, 749, 499, 249], "prediction_type": "epsilon", "renoise": "fresh", "steps": 4}
    assert "sampler `lcm`, schedule `simple`, 4 steps, cfg 1." in sampling_elsewhere(about)
    assert "No schedule" in sampling_elsewhere({**about, "timesteps": [999, 759, 499, 259]})
    flow = {"timesteps": [1000, 750], "prediction_type": "flow", "renoise": "ode", "steps": 2}
    assert "sampler `euler`, schedule `simple`, 2 steps, cfg 1, flow shift 3." in sampling_elsewhere(flow)


def test_the_card_of_a_student_names_its_setting(recorded, tmp_path: Path) -> None:
    _, folder = export(recorded("stable_diffusion"), tmp_path / "lora", steps=4, renoise="fresh")
    assert re.search(r"sampler `lcm`, schedule `simple`, 4 steps", (folder / "README.md").read_text())
