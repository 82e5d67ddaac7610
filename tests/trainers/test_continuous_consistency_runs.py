"""Runs of continuous-time consistency on tiny stock pipelines: what they ship, resume, a second stage, refusals."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import WAN_CALL, tiny_ddim, tiny_edm, tiny_flow, tiny_stable_diffusion, tiny_wan
from torch import nn

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken
from tests.checkpoints import load_latest
from tests.whole_runs import whole_run

METHOD = "continuous_consistency"
RUN = {"max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "sample_steps": 0}
RUN |= {"num_pairs": 4, "pair_steps": 2, "lr": 1e-3}
FLOW_CALL = {"height": 16, "width": 16, "max_sequence_length": 8}
RCM = {"variant": "rcm", "matching_first_step": 0, "critic_updates": 1}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("pipeline", "settings"),
    [
        pytest.param(tiny_stable_diffusion, {"steps": 4}, id="table"),
        pytest.param(tiny_flow, {"steps": 2, "call": FLOW_CALL, "ema_decay": 0.5, **RCM}, id="flow, rcm"),
    ],
)
def test_the_exported_pipeline_samples_what_was_trained_at_every_count(
    pipeline, settings: dict, prompts: str, tmp_path: Path
):
    teacher = pipeline()
    network = teacher.components.get("unet") or teacher.components["transformer"]
    with shaken(network):
        config = method_class(METHOD).Config(
            teacher="tiny", out=str(tmp_path / "run"), **{**RUN, "prompts": prompts, **settings}
        )
        whole = whole_run(config, METHOD, teacher)
        about = json.loads((whole.folder / "fewstep.json").read_text())
        assert about["renoise"] == "fresh" and settings["steps"] in about["counts"]
        student = DiffusionPipeline.from_pretrained(whole.folder)
        student.set_progress_bar_config(disable=True)
        run = whole.bench
        for count in about["counts"]:
            generator = torch.Generator().manual_seed(5)

            def draw(_step: int = 0, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(1, *run.recording.sample_shape, generator=generator)

            call = {**about["call"], "num_inference_steps": count, "output_type": "latent"}
            torch.manual_seed(5)  # some pipelines leave their generator to themselves
            theirs = student("a cat", **call, generator=torch.Generator().manual_seed(5)).images
            if about["noise_follows"] == "global seed" and count > 1:
                continue
            sampler = Sampler(run.recording.schedule, run.student.plan.grids[count], "fresh")
            with torch.no_grad():
                ours = rollout(whole.role, sampler, draw(), run.recording.condition(prompts=["a cat"]), draw)
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3 * float(ours.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"derivative": "discrete"}, id="copies"),
        pytest.param(
            {"lora_rank": 2, "gradient_checkpointing": True, "merge": True, **RCM},
            marks=pytest.mark.soak,
            id="adapters",
        ),
    ],
)
def test_a_run_goes_on_where_it_stopped(settings: dict, prompts: str, tmp_path: Path):
    pipeline = tiny_stable_diffusion()
    common = {**RUN, "steps": 1, "prompts": prompts, "checkpointing_steps": 1, "ema_decay": 0.5, "lr": 1e-2, **settings}
    whole = distill(pipeline, METHOD, out=str(tmp_path / "whole"), **{**common, "max_steps": 3})
    distill(pipeline, METHOD, out=str(tmp_path / "parts"), **{**common, "max_steps": 2})
    parts = distill(pipeline, METHOD, out=str(tmp_path / "parts"), **{**common, "max_steps": 3}, resume=True)
    one, two = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(value, pipeline.unet.state_dict()[name]) for name, value in one.items())


@pytest.mark.soak
def test_a_second_stage_begins_with_the_first_and_keeps_it(prompts: str, tmp_path: Path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), (200, 10, 60)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a cat"}))
    common = {**RUN, "data": str(tmp_path / "images"), "prompts": prompts, "steps": 1, "lr": 1e-2}
    pipeline, common = tiny_edm(), {name: v for name, v in common.items() if name not in ("num_pairs", "pair_steps")}
    distill(pipeline, "consistency", out=str(tmp_path / "first"), variant="ect", **common)
    config = method_class(METHOD).Config(
        teacher="t", out=str(tmp_path / "next"), variant="tcm", init=str(tmp_path / "first"), **common
    )
    roles = prepare(open_workbench(config, "cpu", pipeline), METHOD).roles
    first = {name: value.clone() for name, value in roles["student"].state_dict().items()}
    assert any(not torch.equal(value, roles["teacher"].state_dict()[name]) for name, value in first.items())
    assert all(torch.equal(value, roles["target"].state_dict()[name]) for name, value in first.items())
    distill(pipeline, METHOD, out=str(tmp_path / "next"), variant="tcm", init=str(tmp_path / "first"), **common)
    target = load_latest(tmp_path / "next" / "checkpoints")[1]["target"]
    assert all(torch.equal(value, target[name]) for name, value in first.items())


class Untimed(nn.Module):
    """Loses its time's derivative on the way, without an error."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, *args, **kwargs):
        return self.embedding(*args, **kwargs).detach()


def test_a_teacher_whose_tangent_is_lost_is_refused_in_one_line_that_says_what_to_do(prompts: str, tmp_path: Path):
    pipeline = tiny_stable_diffusion()
    pipeline.unet.time_proj = Untimed(pipeline.unet.time_proj)
    with pytest.raises(UserError, match=r"its derivative by the time is lost.*--derivative discrete") as caught:
        distill(pipeline, METHOD, out=str(tmp_path / "run"), **RUN, steps=1, prompts=prompts)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "pairs").exists()
    distill(pipeline, METHOD, out=str(tmp_path / "run"), **RUN, steps=1, prompts=prompts, derivative="discrete")


def test_teachers_that_cannot_be_followed_are_refused(prompts: str, tmp_path: Path):
    settings = {**RUN, "out": str(tmp_path / "run")}
    with pytest.raises(UserError, match="WanPipeline has 2 networks that share the time"):
        distill(tiny_wan(), METHOD, prompts=prompts, call=WAN_CALL, **settings)
    with pytest.raises(UserError, match="a student with fresh noise cannot ship"):
        distill(tiny_ddim(), METHOD, **settings)
