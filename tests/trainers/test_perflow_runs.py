"""PeRFlow's runs: students that stock diffusers loads and samples as they were trained, resumed, guided or guidable."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import tiny_ddim, tiny_edm, tiny_flow, tiny_stable_diffusion

import fewstep
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.programs.distillation import distill
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.perflow import PerFlowConfig
from tests.whole_runs import whole_run

TINY = {"max_steps": 2, "batch_size": 2, "num_pairs": 6, "pair_steps": 2, "solver_steps": 2, "sample_steps": 0}
TINY |= {"report_to": "none", "cpu": True, "lr": 1e-3}
#: Name -> builder, further settings, the counts that its windows allow and its stock scheduler.
FAMILIES = {
    "flow": (tiny_flow, {"call": {"max_sequence_length": 8}, "windows": 2, "steps": 4}, [2, 4], "FlowMapEuler"),
    "table": (tiny_stable_diffusion, {"form": "ddim_eps", "steps": 2}, [2], "DDIM"),
    "v_prediction": (lambda: tiny_stable_diffusion("v_prediction"), {"form": "diff_eps", "steps": 2}, [2], "DDIM"),
    "velocity of a table": (
        tiny_stable_diffusion,
        {"windows": 1, "steps": 2, "lora_rank": 2, "merge": True},
        [1, 2],
        "",
    ),
    "edm": (tiny_edm, {"windows": 2, "steps": 2, "solver": "heun"}, [2], "EDMEuler"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return str(path)


EVERY = [pytest.param(name, marks=() if name in ("flow", "table") else pytest.mark.soak) for name in FAMILIES]


@pytest.mark.parametrize("family", EVERY)
def test_a_student_loads_stock_and_walks_its_windows(family: str, prompts: str, tmp_path: Path):
    builder, extra, counts, scheduler = FAMILIES[family]
    pipeline = builder()
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    with shaken(network):
        settings = PerFlowConfig(teacher=family, out=str(tmp_path), prompts=prompts, **{**TINY, **extra})
        whole = whole_run(settings, "perflow", pipeline)
        about = json.loads((whole.folder / "fewstep.json").read_text())
        stock = DiffusionPipeline.from_pretrained(whole.folder)
    stock.set_progress_bar_config(disable=True)
    assert type(stock.scheduler).__name__.startswith(scheduler) and "code" not in about
    assert about["counts"] == counts and sorted(map(int, about["grids"])) == counts and not about["guidable"]
    for count in counts:
        call = {**about["call"], "num_inference_steps": count, "output_type": "np"}
        theirs = stock("a cat", **call, generator=torch.Generator().manual_seed(5)).images
        bench = whole.bench
        noise = torch.randn(1, *bench.recording.sample_shape, generator=torch.Generator().manual_seed(5))
        sampler = Sampler(bench.sampler.schedule, tuple(about["grids"][str(count)]), "ode", bench.sampler.initial_scale)
        with torch.no_grad():
            x0 = rollout(whole.role, sampler, noise, bench.recording.condition(prompts=["a cat"]))
        ours = bench.recording.decode(x0).movedim(1, -1)
        assert float((torch.from_numpy(theirs) - ours).abs().max()) < 1 / 255


def test_a_student_that_keeps_its_guidance_says_so_and_takes_it(prompts: str, tmp_path: Path):
    settings = {**TINY, "prompts": prompts, "steps": 2, "guidance": "kept", "label_drop": 0.5}
    pipeline = tiny_stable_diffusion()
    with shaken(pipeline.unet):
        folder = distill(pipeline, "perflow", out=str(tmp_path), **settings)
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["guidable"] and about["call"]["guidance_scale"] <= 1
    assert "keeps it: call it with `guidance_scale`" in (folder / "README.md").read_text()
    student = fewstep.load(folder)
    student.set_progress_bar_config(disable=True)

    def sampled(**call) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return torch.from_numpy(
                student("a cat", output_type="np", generator=torch.Generator().manual_seed(5), **call).images
            )

    assert float((sampled() - sampled(guidance_scale=7.5)).abs().max()) > 1e-3


@pytest.mark.soak
def test_a_lora_run_with_an_average_and_accumulation_resumes(prompts: str, tmp_path: Path):
    settings = {**TINY, "prompts": prompts, "steps": 2, "lora_rank": 2, "ema_decay": 0.5, "lr": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    whole = distill(tiny_stable_diffusion(), "perflow", out=str(tmp_path / "whole"), **settings)
    parts = {**settings, "out": str(tmp_path / "parts"), "pairs": str(tmp_path / "whole" / "pairs")}
    distill(tiny_stable_diffusion(), "perflow", **{**parts, "max_steps": 1})
    again = distill(tiny_stable_diffusion(), "perflow", **parts, resume=True)
    one, two = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance": "kept"}, "needs a teacher with classifier-free guidance"),
        ({"solver_steps": 700}, "are more than the 1000 times of the teacher's table"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(settings: dict, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        distill(tiny_ddim(), "perflow", out=str(tmp_path), **{**TINY, "steps": 2, **settings})
