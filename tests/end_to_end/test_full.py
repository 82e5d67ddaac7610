"""From a teacher to a student that stock diffusers loads, over tiny pipelines of several families."""

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import fewstep
from fewstep.diffusion.rollout import rollout
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.training.pictures import to_uint8
from tests import tiny_pipelines
from tests.checkpoints import load_latest
from tests.stock_process import run_stock
from tests.whole_runs import whole_run

FAMILIES = {
    "ddim": (tiny_pipelines.tiny_ddim, {}),
    "dit": (tiny_pipelines.tiny_dit, {"classes": "0-3"}),
    "stable_diffusion": (tiny_pipelines.tiny_stable_diffusion, {"prompts": True}),
    "v_prediction": (lambda: tiny_pipelines.tiny_stable_diffusion("v_prediction"), {"prompts": True}),
    "edm": (tiny_pipelines.tiny_edm, {"prompts": True}),
    "flow": (tiny_pipelines.tiny_flow, {"prompts": True, "call": {"max_sequence_length": 8}}),
}
TINY_RUN = {"max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "critic_updates": 1}
TINY_RUN |= {"sample_steps": 0}  # a grid costs more than all else of such a run; two of the runs below make theirs

#: What auto means for flow and EDM is ODE.
RUNS = [(family, "auto") for family in FAMILIES] + [
    (family, "ode") for family in FAMILIES if family not in ("edm", "flow")
]

SHORT = [("stable_diffusion", "auto"), ("stable_diffusion", "ode"), ("dit", "auto"), ("edm", "auto"), ("flow", "auto")]

# Runs with only stock diffusers: any import of fewstep fails.
STOCK = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    about = json.load(open(f"{folder}/fewstep.json"))
    condition = {"prompt": {"prompt": "a cat"}, "label": {"class_labels": [1]}, None: {}}[about["conditional"]]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = {}
    for count in about["counts"]:
        call = {**about["call"], **condition, "num_inference_steps": count, "output_type": "np"}
        images[str(count)] = pipeline(**call, generator=torch.Generator().manual_seed(5)).images
    numpy.savez(f"{folder}/images.npz", **images)
"""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na small dog\n\nb\n", encoding="utf-8")
    return str(path)


def settings(family: str, prompts: str) -> dict:
    _, extra = FAMILIES[family]
    return {**TINY_RUN, **extra, **({"prompts": prompts} if extra.get("prompts") else {})}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of real images, each in a folder named after its class."""
    data = tmp_path_factory.mktemp("data")
    for name in "0123":
        (data / name).mkdir()
        Image.new("RGB", (40, 36), (int(name) * 60, 10, 200)).save(data / name / "a.png")
    return str(data)


@pytest.fixture(scope="module")
def students(
    prompts: str, images: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, dict]]:
    """By family and renoise, of those asked for: the student's folder, and the trainer's own pictures by step count.

    Each family's run with auto also has real images, a GAN and an average. One process without fewstep samples them
    all, as it takes seconds to start.
    """
    found = {}
    given = [item.callspec.params for item in request.session.items if _asks(item)]
    asked = {(params["family"], params.get("renoise", "auto")) for params in given}
    for family, renoise in (run for run in RUNS if run in asked):
        pipeline = FAMILIES[family][0]()
        network = pipeline.components.get("unet") or pipeline.components["transformer"]
        out = tmp_path_factory.mktemp(family) / "run"
        with shaken(network):
            chosen = {**settings(family, prompts), "renoise": renoise, "steps": 4, "lr": 1e-3}
            if renoise == "auto":
                chosen |= {"data": images, "gan_weight": 1e-3, "ema_decay": 0.5}
            whole = whole_run(method_class("dmd2").Config(teacher=family, out=str(out), **chosen), "dmd2", pipeline)
            about = json.loads((whole.folder / "fewstep.json").read_text())
            found[family, renoise] = (whole.folder, _own_images(whole.bench, whole.folder, about))
    folders = [str(folder) for folder, _ in found.values()]
    run_stock(STOCK, *folders)
    return found


def _asks(item: pytest.Item) -> bool:
    return "students" in getattr(item, "fixturenames", ()) and item.module.__name__ == __name__


@pytest.mark.parametrize(
    ("family", "renoise"), [pytest.param(*run, marks=() if run in SHORT else pytest.mark.soak) for run in RUNS]
)
def test_a_student_sampled_by_stock_diffusers_equals_the_trainers_own_rollout(
    family: str, renoise: str, students: dict[tuple[str, str], tuple[Path, dict]]
) -> None:
    folder, ours = students[family, renoise]
    about = json.loads((folder / "fewstep.json").read_text())
    with numpy.load(folder / "images.npz") as file:
        theirs = {int(count): torch.from_numpy(images) for count, images in file.items()}
    assert set(theirs) >= {1, 2, 4}
    for count, images in theirs.items():
        if about["renoise"] == "fresh" and about["noise_follows"] != "generator":
            continue  # the noise between steps comes from the global generator: not the same numbers
        difference = (to_uint8(images).int() - to_uint8(ours[count]).int()).abs().max()
        assert difference <= 1, f"{family} at {count} steps: {difference} grey levels apart"


def _own_images(run: Workbench, folder: Path, about: dict) -> dict[int, torch.Tensor]:
    """The trainer's rollout of the exported weights from the same noise, as (1, H, W, C) in [0, 1]."""
    trained = DiffusionPipeline.from_pretrained(folder).components[about["component"]]
    student = prepare(run, "dmd2").roles["student"]
    student.denoiser.network.load_state_dict(trained.state_dict())
    condition = {
        "prompt": lambda: run.recording.condition(prompts=["a cat"]),
        "label": lambda: run.recording.condition(labels=[1]),
        None: lambda: run.recording.condition(),
    }[about["conditional"]]()
    images = {}
    for count in about["counts"]:
        generator = torch.Generator().manual_seed(5)

        def draw(_step: int = 0, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(1, *run.recording.sample_shape, generator=generator)

        sampler = replace(run.sampler, grid=tuple(about["grids"][str(count)]))
        with torch.no_grad():
            x0 = rollout(student, sampler, draw(), condition, step_noise=draw)
        images[count] = run.recording.decode(x0).movedim(1, -1)
    return images


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if (f, "auto") in SHORT else pytest.mark.soak) for f in FAMILIES]
)
def test_real_images_and_a_gan_train_every_family(
    family: str, students: dict[tuple[str, str], tuple[Path, dict]]
) -> None:
    folder, _ = students[family, "auto"]
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(0 < row["critic/adversarial"] < 10 for row in rows)
    assert (folder / "model_index.json").is_file()


def test_a_loaded_student_samples_without_further_arguments(prompts: str, tmp_path: Path) -> None:
    folder = distill(
        tiny_pipelines.tiny_flow(),
        "dmd2",
        out=str(tmp_path / "run"),
        **{**settings("flow", prompts), "steps": 2, "sample_steps": 2},
    )
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
    pipeline = fewstep.load(folder)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline("a cat", output_type="np")
    assert len(calls) == 2


def test_a_second_stage_takes_over_student_and_critic(prompts: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    common = settings("stable_diffusion", prompts)
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    distill(pipeline, "dmd2", out=str(first), **common, steps=2, lr=1e-2)
    config = method_class("dmd2").Config(teacher="t", out=str(tmp_path / "second"), init=str(first), steps=2, **common)
    roles = prepare(open_workbench(config, "cpu", pipeline), "dmd2").roles
    _, tensors = load_latest(first / "checkpoints")
    for name in ("student", "critic"):
        state = roles[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in tensors[name].items())
        teacher = roles["teacher"].state_dict()
        assert any(not torch.equal(state[key], teacher[key]) for key in teacher)


@pytest.mark.soak
def test_a_second_stage_takes_over_the_critic_of_every_phase(tmp_path: Path) -> None:
    pipeline = tiny_pipelines.tiny_ddim()
    common = {**TINY_RUN, "order": "alternating", "steps": 2, "max_steps": 4, "critic_updates": 1, "lr": 1e-2}
    distill(pipeline, "phased_dmd", out=str(tmp_path / "first"), **common)
    config = method_class("phased_dmd").Config(
        teacher="t", out=str(tmp_path / "second"), init=str(tmp_path / "first"), **common
    )
    roles = prepare(open_workbench(config, "cpu", pipeline), "phased_dmd").roles
    _, tensors = load_latest(tmp_path / "first" / "checkpoints")
    teacher = roles["teacher"].state_dict()
    for name in ("student", "critic", "critic_2"):
        state = roles[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in tensors[name].items())
    assert any(not torch.equal(roles["critic_2"].state_dict()[key], value) for key, value in teacher.items())


def test_interrupted_and_resumed_is_the_same_as_uninterrupted(prompts: str, tmp_path: Path) -> None:
    pipeline = tiny_pipelines.tiny_ddim()
    common = {**TINY_RUN, "steps": 2, "checkpointing_steps": 2, "ema_decay": 0.9, "max_steps": 5}
    whole = distill(pipeline, "dmd2", out=str(tmp_path / "whole"), **common)
    distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **{**common, "max_steps": 3})
    parts = distill(pipeline, "dmd2", out=str(tmp_path / "parts"), **common, resume=True)
    one, two = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bf16_and_gradient_checkpointing_train(prompts: str, tmp_path: Path) -> None:
    chosen = {**settings("stable_diffusion", prompts), "mixed_precision": "bf16", "gradient_checkpointing": True}
    chosen |= {"sample_steps": 2, "batch_size": 4}
    folder = distill(tiny_pipelines.tiny_stable_diffusion(), "dmd2", out=str(tmp_path / "run"), **chosen)
    assert DiffusionPipeline.from_pretrained(folder).unet.dtype == torch.float32
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
