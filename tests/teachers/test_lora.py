"""A teacher that is a base model and the user's LoRA: what is fused and refused, and what a student's file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_ddim, tiny_flow, tiny_stable_diffusion
from torch import Tensor, nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import fewstep
from fewstep.errors import UserError
from fewstep.export.apply import LORA_FILE
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.distillation import run as run_method
from fewstep.programs.methods import method_class
from fewstep.recording.watch.shake import shaken
from fewstep.teachers.lora import fuse_teacher_lora, with_own_weights
from tests.checkpoints import load_latest
from tests.whole_runs import whole_run

SETTINGS = {"steps": 2, "max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "lr": 1e-2}
SETTINGS |= {"critic_updates": 1, "sample_steps": 0}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def network_of(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.components.get("unet") or pipeline.transformer


def write_lora(
    pipeline: DiffusionPipeline,
    folder: Path,
    targets: list[str],
    text: bool = False,
    older: bool = False,
    **config: Any,
) -> Path:
    """A LoRA as users' trainers write it, in PEFT's format or diffusers' older one, with products that are not zero."""
    pipeline = with_own_weights(pipeline)
    modules = [network_of(pipeline), *([pipeline.text_encoder] if text else [])]
    states = []
    for module, wanted in zip(modules, (targets, ["q_proj", "v_proj"])):
        # By peft itself: transformers' own add_adapter may want a newer peft than there is.
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=wanted, **config), module, "mine")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        states.append(module)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    names = ("unet" if hasattr(pipeline, "unet") else "transformer", "text_encoder")
    layers = {}
    for name, module in zip(names, states):
        state = get_peft_model_state_dict(module, adapter_name="mine")
        layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state) if older else state
        layers[f"{name}_lora_adapter_metadata"] = module.peft_config["mine"].to_dict()
    type(pipeline).save_lora_weights(folder, **layers)
    return folder


def answer(network: nn.Module, recording: Any) -> Tensor:
    x = torch.randn(2, *recording.sample_shape, generator=torch.Generator().manual_seed(0))
    time = recording.schedule.timestep(torch.full((2,), 0.5, dtype=torch.float64))
    with torch.no_grad():
        return recording.recipe.call(network, x, time, recording.condition(prompts=["a", "b"]))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return str(tmp_path / "prompts.txt")


@pytest.fixture(params=[pytest.param("stable_diffusion", marks=pytest.mark.soak), "flow"])
def base(request: pytest.FixtureRequest) -> tuple[DiffusionPipeline, dict[str, Any]]:
    if request.param == "flow":
        pipeline, more = tiny_flow(), {"call": {"max_sequence_length": 8}}
    else:
        pipeline, more = tiny_stable_diffusion(), {}
    with shaken(network_of(pipeline)):
        return with_own_weights(pipeline), more


def needs_peft_for_text() -> None:
    """Skip where this transformers wants a newer peft for the LoRA of a text encoder."""
    pytest.importorskip("peft", MIN_PEFT_VERSION, reason="transformers wants a newer peft for text encoders")


def test_a_text_encoders_lora_that_transformers_cannot_load_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_stable_diffusion()
    folder = write_lora(pipeline, tmp_path, ATTENTION, text=True)

    def too_old(*_: Any, **__: Any) -> None:
        raise ValueError("The version of PEFT you are using is not compatible")

    monkeypatch.setattr(type(pipeline.text_encoder), "load_adapter", too_old)
    assert "version of PEFT" in refused(pipeline, folder)


def test_fused_is_what_diffusers_itself_runs_with_the_lora(tmp_path: Path) -> None:
    needs_peft_for_text()
    pipeline = tiny_stable_diffusion()
    folder = write_lora(pipeline, tmp_path, [*ATTENTION, "conv1"], text=True)
    stock, fused = with_own_weights(pipeline), with_own_weights(pipeline)
    stock.load_lora_weights(folder)
    before = {name: value.clone() for name, value in fused.unet.state_dict().items()}
    lora = fuse_teacher_lora(fused, str(folder))
    assert lora.apart == "it changes the text_encoder" and set(lora.factors) == {"unet", "text_encoder"}
    assert fused.unet.state_dict().keys() == before.keys()  # a stock network again
    recordings = [fewstep.record(p, prompt="the cat") for p in (stock, fused)]
    told = [r.condition(prompts=["a"]).arguments()["encoder_hidden_states"] for r in recordings]
    torch.testing.assert_close(told[1], told[0])
    assert not torch.allclose(
        told[1], fewstep.record(pipeline, prompt="the cat").condition(["a"]).arguments()["encoder_hidden_states"]
    )
    torch.testing.assert_close(
        answer(fused.unet, recordings[1]), answer(stock.unet, recordings[0]), rtol=1e-4, atol=1e-5
    )
    bare = lora.without("unet", fused.unet).state_dict()
    assert all(torch.allclose(bare[name], value, atol=1e-6) for name, value in before.items())


def test_a_lora_student_loads_on_the_bare_base_and_is_the_role_that_was_trained(
    base: tuple[DiffusionPipeline, dict[str, Any]], prompts: str, tmp_path: Path
) -> None:
    pipeline, more = base
    targets = ATTENTION if hasattr(pipeline, "transformer") else [*ATTENTION, "conv1"]
    lora = write_lora(pipeline, tmp_path / "mine", targets)
    pipeline.save_pretrained(tmp_path / "base")
    words = {**SETTINGS, **more, "prompts": prompts, "lora_rank": 2, "lora_alpha": 4.0, "merge": True}
    config = method_class("dmd2").Config(
        teacher=str(tmp_path / "base"), out=str(tmp_path / "run"), teacher_lora=str(lora), **words
    )
    run = whole_run(config, "dmd2").bench
    student = prepare(run, "dmd2").roles["student"]
    student.load_state_dict(load_latest(tmp_path / "run" / "checkpoints")[1]["student"])
    with student.denoiser.active():
        expected = answer(student.denoiser.network, run.recording)
    scale = expected.abs().max()

    component = run.recording.component
    stock = DiffusionPipeline.from_pretrained(tmp_path / "base")
    bare = answer(getattr(stock, component), run.recording)
    stock.load_lora_weights(tmp_path / "run" / "student_lora")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    for found in (stock, merged, fewstep.load(tmp_path / "run" / "student_lora")):
        assert (answer(getattr(found, component), run.recording) - expected).abs().max() < 1e-4 * scale
    assert (bare - expected).abs().max() > 1e-2 * scale
    # The student moved away from its teacher, which is itself not the bare base.
    teacher = answer(run.recording.network, run.recording)
    assert (teacher - bare).abs().max() > 1e-2 * scale and (expected - teacher).abs().max() > 1e-3 * scale

    tensors = load_file(tmp_path / "run" / "student_lora" / LORA_FILE)
    ranks = {len(value) for name, value in tensors.items() if name.endswith("lora_A.weight")}
    assert ranks == {2, 3 + 2} | ({3} if hasattr(pipeline, "unet") else set())  # only the teacher has the convolutions
    for form in ("student", "student_lora"):
        about = json.loads((tmp_path / "run" / form / "fewstep.json").read_text())
        assert about["teacher_lora"] == "mine" and "teacher_lora" not in about["training"]
        assert "with the LoRA `mine`" in (tmp_path / "run" / form / "README.md").read_text()
    again = method_class("dmd2").Config(**{**vars(config), "resume": True, "teacher_lora": None})
    with pytest.raises(UserError, match="teacher_lora differ from"):
        run_method(again, "dmd2")


def test_a_full_student_starts_as_the_fused_teacher_and_the_pipeline_in_memory_stays(
    prompts: str, tmp_path: Path
) -> None:
    pipeline = tiny_stable_diffusion()
    lora = write_lora(pipeline, tmp_path / "mine", ATTENTION)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    words = {**SETTINGS, "prompts": prompts, "lr": 0.0, "max_steps": 1}
    folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), teacher_lora=str(lora), **words)
    assert all(torch.equal(before[name], value) for name, value in pipeline.unet.state_dict().items())
    fused = with_own_weights(pipeline)
    fuse_teacher_lora(fused, str(lora))
    state = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in fused.unet.state_dict().items())
    assert any(not torch.equal(before[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("config", "text", "why"), [({"use_dora": True}, False, "more than low-rank"), ({}, True, "text_enc")]
)
def test_what_no_lora_file_can_add_up_is_exported_merged(
    config: dict[str, Any], text: bool, why: str, prompts: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if text:
        needs_peft_for_text()
    pipeline = tiny_stable_diffusion()
    lora = write_lora(pipeline, tmp_path / "mine", ATTENTION, text, **config)
    with caplog.at_level("INFO", logger="fewstep"):
        folder = distill(
            pipeline,
            "dmd2",
            out=str(tmp_path / "run"),
            teacher_lora=str(lora),
            **SETTINGS,
            prompts=prompts,
            lora_rank=2,
        )
    assert folder.name == "student" and not (tmp_path / "run" / "student_lora").exists()
    assert any(
        "the teacher's LoRA cannot be a part of the student's" in line and why in line for line in caplog.messages
    )


# --- bad input ------------------------------------------------------------------------------------------------------


def refused(pipeline: DiffusionPipeline, lora: Path | str) -> str:
    """The one line; the network is then as it was."""
    before = {name: value.clone() for name, value in network_of(pipeline).state_dict().items()}
    with pytest.raises(UserError) as caught:
        fuse_teacher_lora(pipeline, str(lora))
    after = network_of(pipeline).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.soak
@pytest.mark.parametrize("text", [False, True], ids=["network", "text_too"])
def test_a_cache_and_pairs_of_a_teacher_with_a_lora(text: bool, prompts: str, tmp_path: Path) -> None:
    if text:
        needs_peft_for_text()
    pipeline = tiny_stable_diffusion()
    with shaken(pipeline.unet):
        pipeline.save_pretrained(tmp_path / "base")
        lora = str(write_lora(pipeline, tmp_path / "mine", ATTENTION, text=text))
    base, words = str(tmp_path / "base"), {"prompts": prompts, "cpu": True}
    bare = fewstep.cache(base, tmp_path / "bare", **words)
    own = fewstep.cache(base, tmp_path / "own", teacher_lora=lora, **words)
    made = {"num": 4, "teacher_steps": 2, "cpu": True}
    pairs = fewstep.make_pairs(base, out=str(tmp_path / "pairs"), teacher_lora=lora, cache=str(own), **made)

    def run(name: str, cache: Path, pairs: Path) -> Path:
        settings = {key: value for key, value in SETTINGS.items() if key != "critic_updates"}
        settings |= {"teacher_lora": lora, "cache": str(cache), "lora_rank": 2, "out": str(tmp_path / f"run_{name}")}
        return distill(base, "rectified_flow", **settings, pairs=str(pairs))

    if text:
        assert run("own", own, pairs).is_dir()
        with pytest.raises(UserError, match=r"of another teacher \(.*\): its text_encoder differs"):
            run("bare", bare, pairs)
    else:  # it encodes as its base does
        assert run("bare", bare, pairs).is_dir()
        other = fewstep.make_pairs(base, out=str(tmp_path / "other"), cache=str(bare), **made)
        with pytest.raises(UserError, match="of another teacher: its unet differs"):
            run("other", bare, other)


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    lora = write_lora(tiny_stable_diffusion(), tmp_path / "sd", ATTENTION)
    assert "is not for this teacher" in refused(tiny_flow(), lora)
    assert "diffusers loads no LoRA into the networks of a DDIMPipeline" in refused(tiny_ddim(), lora)
    other = tiny_stable_diffusion()
    other.register_modules(unet=type(other.unet).from_config({**other.unet.config, "cross_attention_dim": 12}))
    assert "is not for this teacher: Error(s) in loading state_dict" in refused(other, lora)
    shallow = {**other.unet.config, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    other.register_modules(unet=type(other.unet).from_config({**shallow, "cross_attention_dim": 16}))
    assert "is not for this teacher" in refused(other, lora)


def test_a_lora_of_which_a_part_belongs_elsewhere_is_refused(tmp_path: Path) -> None:
    """diffusers loads the rest, and warns at most."""
    pipeline = tiny_stable_diffusion()
    lora = write_lora(pipeline, tmp_path / "sd", ATTENTION)
    state = load_file(lora / LORA_FILE)
    held = len(state) // 2
    more = {key.replace("unet.", "unet.more."): value.clone() for key, value in list(state.items())[:2]}
    for name, extra in (
        ("network", more),
        ("text", {key.replace("unet.more", "text_encoder_9"): v for key, v in more.items()}),
    ):
        save_file(state | extra, tmp_path / f"{name}.safetensors")
        message = refused(pipeline, tmp_path / f"{name}.safetensors")
        assert f"it holds {held + 1} layers, and {held} of them belong here" in message


def test_formats_that_diffusers_mixes_up_are_refused(tmp_path: Path) -> None:
    """Written by diffusers itself: convolutions in another format than attention, and only one of the two is loaded."""
    pipeline = tiny_stable_diffusion()
    whole = write_lora(pipeline, tmp_path / "whole", ATTENTION, older=True)
    assert fuse_teacher_lora(with_own_weights(pipeline), str(whole)).apart is None
    mixed = write_lora(pipeline, tmp_path / "mixed", [*ATTENTION, "conv1"], older=True)
    assert "it holds 40 layers, and 8 of them belong here" in refused(pipeline, mixed)


class ConnectError(Exception):
    """As the network library below the hub's has them: neither an OSError nor a ValueError."""


def test_what_is_no_lora_is_refused(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_stable_diffusion()
    assert "does not exist" in refused(pipeline, tmp_path / "nowhere")
    assert "nor can the hub give it" in refused(pipeline, "owner/name")  # offline

    def unplugged(*_: object) -> None:
        raise ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.list_repo_files", unplugged)
    assert "nor can the hub give it: no route" in refused(pipeline, "owner/name")
    (tmp_path / "old.bin").write_bytes(b"x")
    assert "is no safetensors file" in refused(pipeline, tmp_path / "old.bin")
    assert "holds no safetensors file" in refused(pipeline, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert "cannot be read" in refused(pipeline, tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"x")
    assert "holds 2 of them; name the file itself" in refused(pipeline, tmp_path)
    save_file({"unet.x.lora_up.weight": torch.ones(1), "unet.x.dora_scale": torch.ones(1)}, tmp_path / "c.safetensors")
    assert "is a DoRA of a kind" in refused(pipeline, tmp_path / "c.safetensors")
    student = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **SETTINGS, prompts=prompts, lora_rank=2)
    assert "is a few-step student already" in refused(pipeline, student)
