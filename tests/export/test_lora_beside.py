"""A LoRA student beside other LoRAs: who acts, who says that it does not, and what is added to the weights for good."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lora_students import export, fresh, picture, write_style
from safetensors.torch import load_file, save_file
from torch import nn

import fewstep
from fewstep.export import ExportError, apply, export_student, plan_student
from fewstep.export.apply import LORA_FILE
from fewstep.export.student_adapter import active_adapters, fuse_adapter

CALL = {"prompt": "the cat"}


@pytest.fixture
def student(recorded, tmp_path):
    """A recording, its role, its folder, and the file of somebody else's LoRA."""
    recording = recorded("stable_diffusion")
    role, folder = export(recording, tmp_path / "lora", renoise="ode")
    return recording, role, folder, write_style(recording, tmp_path / "style.safetensors")


def with_style(recording, style, weight=0.8):
    pipeline = fresh(recording)
    pipeline.load_lora_weights(str(style), adapter_name="style")
    pipeline.set_adapters(["style"], [weight])
    return pipeline


def in_weights(recording, role, style=None, weight=0.8):
    """The student's network, and the style's product added to it, with no adapter."""
    network = role.stock_network()
    if style is not None:
        other = with_style(recording, style)
        for path, layer in other.unet.named_modules():
            if hasattr(layer, "lora_A") and "style" in layer.lora_A:
                a, b = (getattr(layer, name)["style"].weight for name in ("lora_A", "lora_B"))
                network.get_submodule(path).weight.data.add_(b.detach() @ a.detach(), alpha=weight)
    return network


def pictured(recording, folder, network):
    """The student's picture with this network in it."""
    pipeline = apply(fresh(recording), folder)
    pipeline.unload_lora_weights()
    pipeline.register_modules(unet=network)
    with warnings.catch_warnings(action="ignore"):  # it is told that it has no adapter
        return picture(pipeline, **CALL)


def quiet(pipeline):
    with warnings.catch_warnings(action="error"):
        return picture(pipeline, **CALL)


# --- who acts ---------------------------------------------------------------------------------------------------------


def test_adapters_that_are_active_stay_so_each_as_strong_as_before(student):
    recording, role, folder, style = student
    pipeline = apply(with_style(recording, style), folder)
    assert pipeline.get_active_adapters() == ["style", "student"]
    found = quiet(pipeline)
    expected = pictured(recording, folder, in_weights(recording, role, style))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - pictured(recording, folder, in_weights(recording, role))).max() > 1e-3


def test_warnings_are_about_the_callers_own_line(student):
    recording, _, folder, _ = student
    pipeline = apply(fresh(recording), folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.disable_lora()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pipeline(**CALL, negative_prompt="ugly", num_inference_steps=7)
    own = [str(warning.message) for warning in seen if warning.filename == __file__]
    assert [next(word for word in ("not the student", "not at 7", "leave out") if word in text) for text in own] == [
        "not the student",
        "not at 7",
        "leave out",
    ]


def test_adapters_that_are_off_stay_off(student):
    recording, role, folder, style = student
    alone = pictured(recording, folder, in_weights(recording, role))
    for switch_off in (lambda p: p.disable_lora(), lambda p: p.unet.disable_adapters()):
        pipeline = with_style(recording, style)
        switch_off(pipeline)
        np.testing.assert_allclose(quiet(apply(pipeline, folder)), alone, rtol=0, atol=1e-5)
    pipeline = with_style(recording, style)
    pipeline.load_lora_weights(str(style), adapter_name="second")  # which switches the first off
    applied = apply(pipeline, folder)
    assert applied.get_active_adapters() == ["second", "student"]


def test_a_call_whose_student_is_off_says_so(student):
    recording, _, folder, style = student
    pipeline = apply(fresh(recording), folder)
    quiet(pipeline)
    pipeline.load_lora_weights(str(style), adapter_name="style")

    def warned() -> str:
        with pytest.warns(UserWarning, match="this is not the student") as caught:
            picture(pipeline, **CALL)
        return str(caught[0].message)

    assert 'its adapter of the unet is not among the active ones; set_adapters(["student", ...])' in warned()
    pipeline.set_adapters(["student", "style"], [1.0, 0.8])
    quiet(pipeline)
    pipeline.set_adapters(["student", "style"], [0.0, 0.8])
    assert "has the weight 0" in warned()
    pipeline.set_adapters(["student"])
    pipeline.disable_lora()
    assert "is disabled" in warned()
    pipeline.enable_lora()
    pipeline.fuse_lora(adapter_names=["style"])
    assert "is passed by, since another LoRA is fused" in warned()
    pipeline.unfuse_lora()
    quiet(pipeline)
    pipeline.delete_adapters("student")
    assert "is not loaded" in warned()
    pipeline.unload_lora_weights()
    assert "is not loaded" in warned()


def test_what_pipelines_hold_already_is_refused_and_stays(student):
    recording, _, folder, style = student

    def refusal(pipeline, **words) -> str:
        before = type(pipeline), pipeline.scheduler, active_adapters(pipeline.unet)
        with pytest.raises(ExportError) as refused:
            apply(pipeline, folder, **words)
        assert before == (type(pipeline), pipeline.scheduler, active_adapters(pipeline.unet))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    pipeline = fresh(recording)
    pipeline.load_lora_weights(str(style), adapter_name="student")
    assert "the unet has an adapter named student already" in refusal(pipeline)
    pipeline = with_style(recording, style)
    pipeline.fuse_lora()
    assert "call unload_lora_weights(), which keeps what is fused" in refusal(pipeline)
    pipeline.unload_lora_weights()  # as the line says
    styled = fresh(recording)
    styled.unet = pipeline.unet
    quiet(apply(styled, folder))


def test_a_pipeline_whose_loader_fails_keeps_its_adapters(student, monkeypatch):
    recording, _, folder, style = student

    def fail(self, *args, **kwargs):
        raise KeyError("x_embedder.weight")

    for pipeline, active in ((with_style(recording, style), ["style"]), (fresh(recording), [])):
        stock = type(pipeline), set(pipeline.unet.state_dict())
        with monkeypatch.context() as patch:
            patch.setattr(type(pipeline), "load_lora_weights", fail)
            with pytest.raises(ExportError, match=r"cannot be loaded into this StableDiffusionPipeline.*KeyError"):
                apply(pipeline, folder)
        assert (type(pipeline), set(pipeline.unet.state_dict())) == stock
        assert active_adapters(pipeline.unet) == active


# --- for good ---------------------------------------------------------------------------------------------------------


def test_fused_it_is_an_ordinary_pipeline_that_saves_and_loads(student, tmp_path):
    recording, role, folder, _ = student
    with warnings.catch_warnings(action="error"):
        pipeline = apply(fresh(recording), folder, fuse=True)
    assert pipeline.unet.state_dict().keys() == recording.network.state_dict().keys()
    found = quiet(pipeline)
    np.testing.assert_allclose(found, pictured(recording, folder, in_weights(recording, role)), rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "whole")
    loaded = fewstep.load(tmp_path / "whole")
    assert "lora" not in loaded.fewstep and loaded.fewstep["steps"] == 2
    np.testing.assert_allclose(quiet(loaded), found, rtol=0, atol=1e-6)
    stock = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(picture(stock, **CALL, **loaded.fewstep["call"]), found, rtol=0, atol=1e-6)


def test_fused_beside_others_it_leaves_them_as_they_are(student):
    recording, role, folder, style = student
    pipeline = apply(with_style(recording, style), folder, fuse=True)
    assert pipeline.get_active_adapters() == ["style"] and set(pipeline.unet.peft_config) == {"style"}
    expected = pictured(recording, folder, in_weights(recording, role, style))
    np.testing.assert_allclose(quiet(pipeline), expected, rtol=0, atol=1e-5)


def test_fused_by_diffusers_and_unloaded_it_is_the_student_still(student, tmp_path):
    recording, role, folder, _ = student
    pipeline = apply(fresh(recording), folder)
    pipeline.fuse_lora(adapter_names=["student"])
    quiet(pipeline)
    pipeline.unload_lora_weights()
    expected = pictured(recording, folder, in_weights(recording, role))
    np.testing.assert_allclose(quiet(pipeline), expected, rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path / "whole")
    np.testing.assert_allclose(quiet(fewstep.load(tmp_path / "whole")), expected, rtol=0, atol=1e-5)


def test_a_pipeline_with_an_adapter_is_not_saved_under_names_that_nothing_loads(student, tmp_path):
    recording, _, folder, style = student
    for pipeline in (apply(fresh(recording), folder), apply(with_style(recording, style), folder, fuse=True)):
        with pytest.raises(ExportError, match=r"is saved under names that nothing loads: .*fuse=True"):
            pipeline.save_pretrained(tmp_path / "again")
        assert not (tmp_path / "again").exists()
    gone = apply(fresh(recording), folder)
    gone.unload_lora_weights()
    with pytest.raises(ExportError, match="what is left is the base model"):
        gone.save_pretrained(tmp_path / "again")


def test_nor_is_a_whole_student_that_a_style_was_loaded_into(student, trained, tmp_path):
    recording, _, _, style = student
    words = {"method": "dmd2", "base_model": "a/b"}
    whole = export_student(recording, trained(recording), plan_student(recording, 2), tmp_path / "whole", **words)
    loaded = fewstep.load(whole)
    loaded.load_lora_weights(str(style), adapter_name="style")
    with pytest.raises(ExportError, match="the unet holds adapters"):
        loaded.save_pretrained(tmp_path / "again")
    loaded.fuse_lora()
    loaded.unload_lora_weights()  # as the line says
    loaded.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(picture(fewstep.load(tmp_path / "again"), **CALL), picture(loaded, **CALL), atol=1e-6)


class FewBits(nn.Parameter):
    """What libraries hold: a parameter that is not its own numbers."""


def test_what_nothing_can_be_added_to_is_refused(student):
    recording, _, folder, _ = student

    def refusal(spoil) -> str:
        pipeline = fresh(recording)
        spoil(pipeline.unet)
        with pytest.raises(ExportError) as refused:
            apply(pipeline, folder, fuse=True)
        assert not hasattr(pipeline, "fewstep") and active_adapters(pipeline.unet) == []
        return str(refused.value)

    def quantize(network):
        network.conv_in.weight = FewBits(network.conv_in.weight.data)

    assert "its weights are quantised" in refusal(quantize)
    words = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    assert "stored as float8_e4m3fn" in refusal(lambda network: network.enable_layerwise_casting(**words))
    assert "offloaded" in refusal(lambda network: network.to("meta"))
    pipeline = fresh(recording)
    quantize(pipeline.unet)
    applied = apply(pipeline, folder)  # an adapter beside such weights is right
    with pytest.raises(ExportError, match="its weights are quantised"):
        applied.fuse_lora()


def test_what_rounding_takes_away_is_said(student, tmp_path):
    """A change of a thousandth in bfloat16 weights, which hold three decimal digits."""
    recording, _, folder, _ = student
    pipeline = apply(fresh(recording).to(dtype=torch.bfloat16), folder)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-3)
    lost = fuse_adapter(pipeline.unet)
    assert 0.1 < lost < 1.5
    half = fresh(recording).to(dtype=torch.bfloat16)
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    state = load_file(small / LORA_FILE)
    save_file({k: v * 1e-3 if "lora_B" in k else v for k, v in state.items()}, small / LORA_FILE, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"\d+% of the student's change of the unet is lost .* its bfloat16 weights"):
        apply(half, small, fuse=True)
    assert fuse_adapter(apply(fresh(recording), folder).unet) < 1e-5
