"""Whole runs of segmented consistency on tiny stock pipelines: what ships, at which counts, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.recording.watch.shake import shaken
from tests.whole_runs import whole_run

NAME = "segmented_consistency"
RUN = {"max_steps": 3, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "sample_steps": 0, "lr": 1e-3}
FLOW_CALL = {"max_sequence_length": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "prompts.txt").write_text("a cat\nb\n", encoding="utf-8")
    for name in "01":
        (folder / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 36), (int(name) * 60, 10, 200)).save(folder / "data" / name / "a.png")
    return {"prompts": str(folder / "prompts.txt"), "data": str(folder / "data")}


def about(folder: Path) -> dict:
    return json.loads((folder / "fewstep.json").read_text())


def test_one_student_of_stages_walks_as_trained_at_every_count_with_the_stock_scheduler(
    inputs: dict[str, str], tmp_path: Path
):
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    settings = {**RUN, **inputs, "variant": "tscd", "segments": [2, 1], "stage_steps": [1], "steps": 4, "gamma": 0.5}
    config = method_class(NAME).Config(teacher="tiny", out=str(tmp_path / "run"), **settings)
    with shaken(pipeline.unet):
        whole = whole_run(config, NAME, pipeline)
        said = about(whole.folder)
        assert (said["scheduler"], said["counts"], said["gamma"]) == ("TCDScheduler", [1, 2, 3, 4], 0.5)
        assert said["call"]["eta"] == 0.5 and "code" not in said
        assert "not trained at" not in (whole.folder / "README.md").read_text()
        student = DiffusionPipeline.from_pretrained(whole.folder)
        student.set_progress_bar_config(disable=True)
        run = whole.bench
        for count in (1, 4):
            call = {**said["call"], "num_inference_steps": count, "output_type": "latent"}
            theirs = student("a cat", **call, generator=torch.Generator().manual_seed(5)).images
            generator = torch.Generator().manual_seed(5)

            def draw(_step: int = 0, generator=generator) -> torch.Tensor:
                return torch.randn(1, *run.recording.sample_shape, generator=generator)

            plan = run.student.plan
            sampler = Sampler(run.recording.schedule, plan.grids[count], plan.renoise, plan.initial_scale, plan.gamma)
            method = prepare(run, NAME)
            method.student.denoiser.network.load_state_dict(student.unet.state_dict())
            with torch.no_grad():
                ours = rollout(method.student, sampler, draw(), run.recording.condition(prompts=["a cat"]), draw)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["discriminator/adversarial" in row for row in rows] == [True] * 3  # its last two stages are judged


@pytest.mark.parametrize(
    ("settings", "form", "scheduler"),
    [
        ({}, "student_lora", "FlowMapEulerDiscreteScheduler"),
        ({"renoise": "tcd"}, "student", "FlowTCDScheduler"),  # no LoRA holds the code of its scheduler
    ],
)
def test_a_flow_student_is_stock_without_new_noise_and_brings_its_scheduler_with_it(
    inputs: dict[str, str], tmp_path: Path, settings: dict, form: str, scheduler: str
):
    pipeline = tiny_pipelines.tiny_flow()
    with shaken(pipeline.transformer):
        pipeline.save_pretrained(tmp_path / "base")
    settings = {**RUN, **settings, "prompts": inputs["prompts"], "steps": 2, "call": FLOW_CALL, "lora_rank": 2}
    folder = distill(tmp_path / "base", NAME, out=str(tmp_path / "run"), **settings)
    assert (folder.name, about(folder)["scheduler"]) == (form, scheduler)
    assert about(folder).get("code") == ("tcd_flow.py" if settings.get("renoise") else None)


def test_a_student_of_phases_has_one_count(inputs: dict[str, str], tmp_path: Path):
    settings = {**RUN, **inputs, "variant": "pcm", "steps": 2, "adversarial_weight": [0.1]}
    folder = distill(tiny_pipelines.tiny_stable_diffusion(), NAME, out=str(tmp_path / "run"), **settings)
    assert (about(folder)["scheduler"], about(folder)["counts"]) == ("DDIMScheduler", [2])


def test_a_run_goes_on_with_target_and_discriminator(inputs: dict[str, str], tmp_path: Path):
    pipeline = tiny_pipelines.tiny_edm()
    common = {**RUN, "prompts": inputs["prompts"], "steps": 1, "adversarial_weight": [0.5], "checkpointing_steps": 2}
    whole = distill(pipeline, NAME, out=str(tmp_path / "whole"), **common)
    distill(pipeline, NAME, out=str(tmp_path / "parts"), **{**common, "max_steps": 2})
    parts = distill(pipeline, NAME, out=str(tmp_path / "parts"), **common, resume=True)
    one, two = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(tmp_path / "parts")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renoise": "tcd"}, "no stock scheduler renoises an EDM student afresh; take --renoise ode"),
        ({"guidance_min": 2.0, "guidance_max": 4.0}, "--guidance_min needs a teacher with classifier-free guidance"),
    ],
)
def test_what_its_pipeline_cannot_do_is_refused_in_one_line(tmp_path: Path, settings: dict, message: str):
    pipeline = tiny_pipelines.tiny_ddim() if "guidance_min" in settings else tiny_pipelines.tiny_edm()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    settings = {**RUN, **settings, **({} if "guidance_min" in settings else {"prompts": str(prompts)})}
    with pytest.raises(UserError, match=message) as caught:
        distill(pipeline, NAME, out=str(tmp_path / "run"), **settings)
    assert "\n" not in str(caught.value)
