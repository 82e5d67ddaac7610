"""Consistency students of tiny stock pipelines: what they ship, LCM-LoRA, guidance as an input, data of any kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from fewstep.cli import main
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken
from tests.whole_runs import whole_run

TINY_RUN = {"max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "sample_steps": 0}
FLOW_CALL = {"max_sequence_length": 8}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\nb\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of other sizes than any teacher's, one for each prompt."""
    data = tmp_path_factory.mktemp("pictures")
    for name in "01":
        (data / name).mkdir()
        Image.new("RGB", (40, 36), (int(name) * 60, 10, 200)).save(data / name / "a.png")
    return str(data)


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fewstep.json").read_text())


def own_latents(run: Workbench, count: int, prompt: str) -> torch.Tensor:
    """The trainer's own walk with f, from the noise that the stock pipeline draws."""
    method = prepare(run, "consistency")
    generator = torch.Generator().manual_seed(5)

    def draw(_step: int = 0) -> torch.Tensor:
        return torch.randn(1, *run.recording.sample_shape, generator=generator)

    network = DiffusionPipeline.from_pretrained(Path(run.config.out) / "student").components[run.recording.component]
    method.student.denoiser.network.load_state_dict(network.state_dict())
    sampler = Sampler(run.recording.schedule, run.student.plan.grids[count], run.student.plan.renoise)
    with torch.no_grad():
        f = method.function(method.student)
        return rollout(f, sampler, draw(), run.recording.condition(prompts=[prompt]), step_noise=draw)


@pytest.mark.parametrize("variant", ["lcm", "ect"])
def test_the_exported_pipeline_computes_the_trained_function_at_every_count(
    variant: str, prompts: str, pictures: str, tmp_path: Path
):
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    with shaken(pipeline.unet):
        settings = {**TINY_RUN, "prompts": prompts, "data": pictures, "lr": 1e-3, "steps": 4, "variant": variant}
        config = method_class("consistency").Config(teacher="tiny", out=str(tmp_path / "run"), **settings)
        whole = whole_run(config, "consistency", pipeline)
        folder, run = whole.folder, whole.bench
        student = DiffusionPipeline.from_pretrained(folder)
        student.set_progress_bar_config(disable=True)
        for count in (1, 2, 4):
            call = {**about(folder)["call"], "num_inference_steps": count, "output_type": "latent"}
            theirs = student("a cat", **call, generator=torch.Generator().manual_seed(5)).images
            ours = own_latents(run, count, "a cat")
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_the_card_says_that_every_count_was_trained(prompts: str, tmp_path: Path):
    folder = distill(
        tiny_pipelines.tiny_stable_diffusion(), "consistency", out=str(tmp_path), **TINY_RUN, prompts=prompts
    )
    assert about(folder)["counts"] == [1, 2, 3, 4, 5, 6, 7, 8]
    card = (folder / "README.md").read_text()
    assert "not trained at" not in card
    for count in (1, 2, 4):
        assert f"| {count} | " in card


# --- LCM-LoRA ---------------------------------------------------------------------------------------------------------


def check_lora(base: Path, lora: Path, condition: dict[str, Any]) -> None:
    """Stock diffusers loads the LoRA, it changes the network's answers, and every listed count samples."""
    said = about(lora)
    pipeline = DiffusionPipeline.from_pretrained(base, **said["load"])
    pipeline.set_progress_bar_config(disable=True)
    answers: list[torch.Tensor] = []

    def note(_module: Any, _arguments: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output.sample
        answers.append(output.detach().clone())

    getattr(pipeline, said["component"]).register_forward_hook(note)
    pipeline.scheduler = getattr(diffusers, said["scheduler"]).from_pretrained(lora, subfolder="scheduler")

    def first_answer(count: int) -> torch.Tensor:
        answers.clear()
        call = {**said["call"], **condition, "num_inference_steps": count, "output_type": "latent"}
        sample = pipeline(**call, generator=torch.Generator().manual_seed(0))[0]
        assert torch.isfinite(sample).all()
        assert len(answers) == count
        return answers[0]

    before = first_answer(said["steps"])
    pipeline.load_lora_weights(str(lora), weight_name=said["lora"]["file"])
    for count in said["counts"]:
        assert not torch.allclose(first_answer(count), before)


@pytest.mark.parametrize("family", [pytest.param("stable_diffusion", marks=pytest.mark.soak), "flow"])
def test_a_lora_loads_in_stock_diffusers_and_samples(family: str, prompts: str, tmp_path: Path):
    make, extra = {
        "stable_diffusion": (tiny_pipelines.tiny_stable_diffusion, {}),
        "flow": (tiny_pipelines.tiny_flow, {"call": FLOW_CALL}),
    }[family]
    pipeline = make()
    with shaken(pipeline.components.get("unet") or pipeline.components["transformer"]):
        pipeline.save_pretrained(tmp_path / "base")
    settings = {**TINY_RUN, "prompts": prompts, "lora_rank": 4, "lr": 1e-2, "steps": 4, "guidance_scale": 4.0, **extra}
    settings |= {"guidance_min": 3.0, "guidance_max": 5.0, "max_steps": 3}
    lora = distill(tmp_path / "base", "consistency", out=str(tmp_path / "run"), **settings)
    assert lora.name == "student_lora"
    check_lora(tmp_path / "base", lora, {"prompt": "a cat"})


@pytest.mark.parametrize(
    "name",
    ["StableDiffusion3", *(pytest.param(name, marks=pytest.mark.soak) for name in ("StableDiffusion", "Flux", "Sana"))],
)
def test_loras_of_the_zoo_load_in_stock_diffusers_and_sample(
    name: str, zoo: Path, tmp_path: Path, pytestconfig: pytest.Config
):
    if not pytestconfig.option.zoo_given and name != "Flux":
        pytest.skip("one of them takes seconds: give --zoo for all")
    pipeline = DiffusionPipeline.from_pretrained(zoo / name)
    with shaken(pipeline.components.get("unet") or pipeline.components["transformer"]):
        pipeline.save_pretrained(tmp_path / "base")
    call = dict(json.loads((zoo / "manifest.json").read_text())[name]["call"])
    prompt = call.pop("prompt")
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n", encoding="utf-8")
    words = ["distill", "consistency", "--teacher", str(tmp_path / "base"), "--out", str(tmp_path / "run")]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--call", json.dumps(call), "--steps", "2", "--cpu"]
    words += ["--lora_rank", "4", "--lr", "1e-2", "--max_steps", "2", "--batch_size", "1", "--report_to", "none"]
    words += ["--sample_steps", "0"]
    assert main(words) == 0
    check_lora(tmp_path / "base", tmp_path / "run" / "student_lora", {"prompt": prompt})


# --- guidance as an input ---------------------------------------------------------------------------------------------


def test_a_student_that_is_told_its_guidance_is_stock_and_heeds_it(prompts: str, tmp_path: Path):
    settings = {**TINY_RUN, "prompts": prompts, "steps": 2, "lr": 3e-2, "max_steps": 6, "ema_decay": 0.1}
    settings |= {"guidance_min": 2.0, "guidance_max": 9.0, "guidance_embedding": True, "guidance_scale": 4.0}
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    with shaken(pipeline.unet):
        folder = distill(pipeline, "consistency", out=str(tmp_path / "run"), **settings)
        assert UNet2DConditionModel.from_pretrained(folder / "unet").config.time_cond_proj_dim == 256
        said = about(folder)
        assert (said["call"]["guidance_scale"], said["guidance_range"]) == (4.0, [2.0, 9.0])
        assert "anything from 2 to 9" in (folder / "README.md").read_text()
        student = DiffusionPipeline.from_pretrained(folder)
        student.set_progress_bar_config(disable=True)
        calls: list[int] = []
        student.unet.register_forward_hook(lambda _m, _a, output: calls.append(len(output[0])))
        latents = {}
        for scale in (2.0, 9.0):
            call = {**said["call"], "guidance_scale": scale, "output_type": "latent"}
            latents[scale] = student("a cat", **call, generator=torch.Generator().manual_seed(0)).images
        assert calls == [1, 1, 1, 1]
        assert not torch.allclose(latents[2.0], latents[9.0], atol=1e-4)


def test_guidance_that_cannot_be_told_or_drawn_is_refused(prompts: str, tmp_path: Path):
    settings = {**TINY_RUN, "steps": 1, "guidance_min": 2.0, "guidance_max": 9.0}
    with pytest.raises(UserError, match="--guidance_min needs a teacher with classifier-free guidance"):
        distill(tiny_pipelines.tiny_ddim(), "consistency", out=str(tmp_path), **settings)
    settings |= {"prompts": prompts, "call": FLOW_CALL, "guidance_embedding": True}
    with pytest.raises(UserError, match="SD3Transformer2DModel has no guidance embedding"):
        distill(tiny_pipelines.tiny_flow(), "consistency", out=str(tmp_path), **settings)


def test_a_default_guidance_beyond_the_range_is_refused(prompts: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"sampled at guidance_scale=7\.5.*between them"):
        distill(
            tiny_pipelines.tiny_stable_diffusion(),
            "consistency",
            out=str(tmp_path),
            **{**TINY_RUN, "prompts": prompts, "steps": 1},
            **{"guidance_min": 2.0, "guidance_max": 4.0, "guidance_embedding": True},
        )


# --- data, and pipelines that cannot carry a student ------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ict", pytest.param("ect", marks=pytest.mark.soak)])
def test_training_on_images_of_any_size(variant: str, pictures: str, tmp_path: Path):
    settings = {**TINY_RUN, "variant": variant, "steps": 1, "data": pictures}
    folder = distill(tiny_pipelines.tiny_ddim(), "consistency", out=str(tmp_path), **settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["student/consistency"] > 0 for row in rows)
    assert about(folder)["counts"] == [1]


@pytest.mark.parametrize(("kind", "message"), [("missing", "is not a folder"), ("empty", "holds no images")])
def test_data_that_is_not_there_is_refused(kind: str, message: str, tmp_path: Path):
    data = tmp_path / "data"
    if kind == "empty":
        data.mkdir()
    settings = {**TINY_RUN, "variant": "ict", "steps": 1, "data": str(data)}
    with pytest.raises(UserError, match=message):
        distill(tiny_pipelines.tiny_ddim(), "consistency", out=str(tmp_path / "run"), **settings)


def test_images_for_a_video_teacher_are_refused(zoo: Path, pictures: str, prompts: str, tmp_path: Path):
    call = dict(json.loads((zoo / "manifest.json").read_text())["Wan"]["call"])
    call.pop("prompt")
    settings = {**TINY_RUN, "variant": "ict", "steps": 1, "data": pictures, "prompts": prompts, "call": call}
    with pytest.raises(UserError, match="this teacher makes videos"):
        distill(zoo / "Wan", "consistency", out=str(tmp_path / "run"), **settings)


def test_several_steps_where_no_scheduler_renoises_are_refused_with_what_this_method_takes(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"a student with fresh noise cannot ship: .*; take --steps 1, which needs none"
    ):
        distill(tiny_pipelines.tiny_ddim(), "consistency", out=str(tmp_path), **{**TINY_RUN, "steps": 2})


def test_a_teacher_that_predicts_x0_is_no_start_for_training_from_data(prompts: str, pictures: str, tmp_path: Path):
    settings = {**TINY_RUN, "variant": "ect", "steps": 1, "data": pictures, "prompts": prompts}
    with pytest.raises(UserError, match="this one predicts x0 itself"):
        distill(tiny_pipelines.tiny_stable_diffusion("sample"), "consistency", out=str(tmp_path / "run"), **settings)


def test_a_run_goes_on_with_its_target_and_from_another_run(prompts: str, tmp_path: Path):
    pipeline = tiny_pipelines.tiny_edm()
    common = {**TINY_RUN, "variant": "cd", "steps": 1, "prompts": prompts, "checkpointing_steps": 2, "ema_decay": 0.9}
    whole = distill(pipeline, "consistency", out=str(tmp_path / "whole"), **{**common, "max_steps": 3})
    distill(pipeline, "consistency", out=str(tmp_path / "parts"), **{**common, "max_steps": 2})
    parts = distill(pipeline, "consistency", out=str(tmp_path / "parts"), **{**common, "max_steps": 3}, resume=True)
    one, two = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(tmp_path / "parts")
    config = method_class("consistency").Config(
        teacher="t", out=str(tmp_path / "next"), init=str(tmp_path / "whole"), **common
    )
    method = prepare(open_workbench(config, "cpu", pipeline), "consistency")
    student = method.roles["student"].state_dict()
    for name in ("target", "ema"):
        assert all(torch.equal(value, student[key]) for key, value in method.roles[name].state_dict().items())
    teacher = method.roles["teacher"].state_dict()
    assert any(not torch.equal(student[key], teacher[key]) for key in teacher)
