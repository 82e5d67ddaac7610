"""From a teacher to a LoRA student that stock diffusers loads, over tiny pipelines."""

import json
import re
import shutil
from pathlib import Path

import numpy
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import fewstep
from fewstep.cli import main
from fewstep.errors import UserError
from fewstep.eval.models import student_model
from fewstep.export.apply import LORA_FILE, apply
from fewstep.networks.adapters import AdapterRole
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken
from tests.checkpoints import load_latest
from tests.whole_runs import whole_run

TINY_RUN = {"steps": 2, "max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True}
TINY_RUN |= {"critic_updates": 1, "lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "sample_steps": 0}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na small dog\nb\n", encoding="utf-8")
    return str(path)


# --- the run ----------------------------------------------------------------------------------------------------------


def tiny(family: str, prompts: str) -> tuple[DiffusionPipeline, dict]:
    more = {"prompts": prompts, **({"call": {"max_sequence_length": 8}} if family == "flow" else {})}
    return getattr(tiny_pipelines, f"tiny_{family}")(), {**TINY_RUN, **more}


def test_without_a_lora_loader_the_student_is_merged_and_one_line_says_so(tmp_path: Path, caplog) -> None:
    pipeline = tiny_pipelines.tiny_ddim()
    with caplog.at_level("INFO", logger="fewstep"), shaken(pipeline.unet):
        folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **TINY_RUN)
        assert folder.name == "student" and not (tmp_path / "run" / "student_lora").exists()
        trained = DiffusionPipeline.from_pretrained(folder).unet.state_dict()
        moved = {key for key, value in pipeline.unet.state_dict().items() if not torch.equal(value, trained[key])}
    assert moved and all("attentions" in key or "attention" in key or "time_emb_proj" in key for key in moved)
    assert "diffusers loads no LoRA into a UNet2DModel: exported merged, as a pipeline" in caplog.messages


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="adapters"),
        pytest.param({"full_critic": True}, id="full_critic", marks=pytest.mark.soak),
    ],
)
def test_a_gan_in_bfloat16_under_checkpointing(options: dict, prompts: str, tmp_path: Path) -> None:
    for name in "01":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 36), (int(name) * 60, 10, 200)).save(tmp_path / "data" / name / "a.png")
    pipeline, settings = tiny("stable_diffusion", prompts)
    settings |= {"data": str(tmp_path / "data"), "gan_weight": 1e-3, "ema_decay": 0.5, **options}
    settings |= {"mixed_precision": "bf16", "gradient_checkpointing": True}
    with shaken(pipeline.unet):
        folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **settings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["critic/adversarial"] < 10 for row in rows)
    assert {value.dtype for value in load_file(folder / LORA_FILE).values()} == {torch.float32}
    _, tensors = load_latest(tmp_path / "run" / "checkpoints")
    parts = {name: {key.partition(".")[0] for key in tensors[name]} for name in ("student", "critic", "ema")}
    critic = "network" if options else "adapter"
    assert parts == {"student": {"adapter"}, "critic": {critic, "head"}, "ema": {"adapter"}}


def test_what_is_loaded_is_what_the_checkpoint_holds(prompts: str, tmp_path: Path) -> None:
    pipeline, settings = tiny("flow", prompts)
    with shaken(pipeline.transformer):
        config = method_class("dmd2").Config(teacher="t", out=str(tmp_path / "run"), **settings)
        whole = whole_run(config, "dmd2", pipeline)
        folder, run = whole.folder, whole.bench
        student = prepare(run, "dmd2").roles["student"]
        student.load_state_dict(load_latest(tmp_path / "run" / "checkpoints")[1]["student"])
        assert isinstance(student, AdapterRole)
        x = torch.randn(1, *run.recording.sample_shape)
        t = torch.full((1,), 0.75, dtype=torch.float64)
        conditioning = run.recording.condition(prompts=["a cat"])
        applied = apply(pipeline, folder)
        with torch.no_grad():
            expected = student.denoiser.raw(x, t, conditioning)
            found = run.recording.recipe.call(applied.transformer, x, run.recording.schedule.timestep(t), conditioning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_interrupted_and_resumed_is_the_same_as_uninterrupted(prompts: str, tmp_path: Path) -> None:
    pipeline, settings = tiny("stable_diffusion", prompts)
    settings |= {"checkpointing_steps": 2, "ema_decay": 0.9, "max_steps": 5}
    with shaken(pipeline.unet):
        whole = distill(pipeline, "dmd2", out=str(tmp_path / "whole"), **settings)
        distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **{**settings, "max_steps": 3})
        parts = distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **settings, resume=True)
    one, two = (load_file(folder / LORA_FILE) for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with shaken(pipeline.unet):
        merged = distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **settings, resume=True, merge=True)
    assert (merged / "model_index.json").is_file()  # an afterthought trains nothing again
    states = [load_latest(folder.parent / "checkpoints")[0]["files"] for folder in (whole, parts)]
    assert states[0] == states[1]


@pytest.mark.soak
def test_a_second_stage_takes_over_the_adapters(prompts: str, tmp_path: Path) -> None:
    pipeline, settings = tiny("stable_diffusion", prompts)
    first = tmp_path / "first"
    distill(pipeline, "dmd2", out=str(first), **settings)
    _, tensors = load_latest(first / "checkpoints")

    def roles(**options):
        config = method_class("dmd2").Config(teacher="t", out=str(tmp_path / "next"), **{**settings, **options})
        return prepare(open_workbench(config, "cpu", pipeline), "dmd2").roles

    taken = roles(init=str(first), ema_decay=0.5)
    for name, source in (("student", "student"), ("critic", "critic"), ("ema", "student")):
        state = taken[name].state_dict()
        assert state.keys() == tensors[source].keys()
        assert all(torch.equal(state[key], value) for key, value in tensors[source].items())
    with pytest.raises(UserError, match="holds an adapter for the student where this run has a network"):
        roles(init=str(first), lora_rank=0, lora_alpha=None)
    with pytest.raises(UserError, match="holds an adapter for the critic where this run has a network"):
        roles(init=str(first), full_critic=True)
    with pytest.raises(UserError, match="has other weights for the student than this run trains"):
        roles(init=str(first), lora_rank=2)
    with pytest.raises(UserError, match="was trained with --lora_alpha 8; give this run the same"):
        roles(init=str(first), lora_alpha=None)
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    with pytest.raises(UserError, match="is a whole network"):
        roles(init=str(base))


@pytest.mark.parametrize("kind", [pytest.param("stable_diffusion", marks=pytest.mark.soak), "flow"])
def test_a_lora_is_loaded_sampled_and_evaluated_on_its_base_as_the_merged_student(
    kind: str, prompts: str, tmp_path: Path, capsys
) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    pipeline, settings = tiny(kind, prompts)
    with shaken(next(pipeline.components[name] for name in ("unet", "transformer") if name in pipeline.components)):
        pipeline.save_pretrained(base)
    distill(base, "dmd2", out=str(out), **settings, merge=True, renoise="ode")
    lora, merged = out / "student_lora", out / "student"
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(lora, elsewhere)

    def picture(folder: Path, *more: str) -> numpy.ndarray:
        words = ["sample", str(folder), "--prompt", "a", "--num", "2", "--out", str(tmp_path / "a.png"), *more]
        assert main(words) == 0, capsys.readouterr().err
        return numpy.asarray(Image.open(tmp_path / "a.png")).astype(int)

    expected = picture(merged)
    for found in (picture(lora), picture(elsewhere, "--base", str(base))):
        assert numpy.abs(found - expected).max() <= 1 < numpy.ptp(expected)
    shutil.move(merged, tmp_path / "merged")
    assert numpy.abs(picture(out) - expected).max() <= 1  # a run's folder that holds a LoRA alone

    calls = []
    loaded = fewstep.load(elsewhere, base=base)
    getattr(loaded, loaded.fewstep["component"]).register_forward_hook(lambda *_: calls.append(1))
    loaded("a", output_type="np")
    assert len(calls) == 2

    rows = []
    for folder in (tmp_path / "merged", lora):
        report = tmp_path / f"report_{folder.name}"
        words = ["eval", str(folder), "--steps", "2", "--num", "3", "--prompts", prompts, "--out", str(report)]
        assert main(words) == 0, capsys.readouterr().err
        rows += json.loads((report / "report.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(2, 2), (2, 2)]
    grids = [numpy.asarray(Image.open(tmp_path / f"report_{name}" / "grid.png")) for name in ("merged", "student_lora")]
    assert numpy.abs(grids[0].astype(int) - grids[1]).max() <= 1 < numpy.ptp(grids[0])
    assert "| student, 2 steps |" in (lora / "README.md").read_text()

    def refusal(*words: str) -> str:
        capsys.readouterr()
        assert main(["sample", *words, "--prompt", "a", "--out", str(tmp_path / "a.png")]) == 2
        return capsys.readouterr().err

    # "base" is the name of a folder that does not lie here; a relative one that does is taken.
    assert "is a LoRA of base, which does not lie here under that name: say where (--base DIR)" in refusal(
        str(elsewhere)
    )
    assert "is no folder of a diffusers pipeline" in refusal(str(elsewhere), "--base", str(tmp_path / "nowhere"))
    assert "is a whole pipeline and has no base model" in refusal(str(tmp_path / "merged"), "--base", str(base))
    other = tmp_path / "other"
    tiny_pipelines.tiny_ddim().save_pretrained(other)
    assert re.search("(does not fit|is for the transformer)", refusal(str(elsewhere), "--base", str(other)))


def test_what_apply_gives_is_evaluated_too(prompts: str, tmp_path: Path) -> None:
    pipeline, settings = tiny("stable_diffusion", prompts)
    folder = distill(pipeline, "dmd2", out=str(tmp_path / "run"), **settings)
    model = student_model(apply(pipeline, folder))
    assert (model.steps, model.source, model.kind) == (2, None, "prompt")


def test_the_command_line_says_what_is_wrong_in_one_line(prompts: str, tmp_path: Path, capsys) -> None:
    base = tmp_path / "base"
    tiny_pipelines.tiny_stable_diffusion().save_pretrained(base)
    words = ["distill", "dmd2", "--teacher", str(base), "--prompts", prompts, "--out", str(tmp_path / "run"), "--cpu"]

    def refusal(*more: str) -> str:
        capsys.readouterr()
        assert main([*words, *more]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
        assert len(lines) == 1
        return lines[0]

    assert "--lora_rank 99 is larger than a layer of UNet2DConditionModel" in refusal("--lora_rank", "99")
    assert "--lora_rank must not be negative" in refusal("--lora_rank", "-1")
    assert "--lora_alpha must be positive" in refusal("--lora_rank", "2", "--lora_alpha", "-1")
    for flag in ("--merge", "--full_critic"):
        assert f"{flag} belongs to adapters: give --lora_rank" in refusal(flag)
