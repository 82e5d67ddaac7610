"""SiD over stock pipelines: students that stock diffusers samples as the trainer does; LoRA, resume, real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import rollout
from fewstep.errors import UserError
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.training.pictures import to_uint8
from tests.stock_process import run_stock
from tests.whole_runs import whole_run

TINY_RUN = {"max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True, "sample_steps": 0}
FLOW = {"call": {"max_sequence_length": 8}, "renoise": "fresh", "steps": 4}
ONE_STEP = {"steps": 1, "first_timestep": 625, "guidance_scale": 2.0}

STOCK = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    about = json.load(open(f"{folder}/fewstep.json"))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(11)
    call = {**about["call"], "output_type": "np", "generator": torch.Generator().manual_seed(5)}
    numpy.save(f"{folder}/images.npy", pipeline("a cat", **call).images)
"""


def write_prompts(folder: Path) -> str:
    path = folder / "prompts.txt"
    path.write_text("a cat\na small dog\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def configured(out: Path, **settings: Any) -> Any:
    return method_class("sid").Config(teacher="tiny", out=str(out), **{**TINY_RUN, **settings})


def opened(pipeline: Any, out: Path, **settings: Any) -> Workbench:
    return open_workbench(configured(out, **settings), "cpu", pipeline)


def network_of(pipeline: Any) -> torch.nn.Module:
    return pipeline.components.get("unet") or pipeline.components["transformer"]


# --- students that stock diffusers samples ----------------------------------------------------------------------------

STUDENTS = {
    "epsilon": ("StableDiffusion", tiny_pipelines.tiny_stable_diffusion, ONE_STEP),
    "flow": ("StableDiffusion3", tiny_pipelines.tiny_flow, FLOW),
}


@pytest.fixture(scope="module")
def students(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple]:
    """One of each kind, the suite's own and in the soak the zoo's: the run, and the trainer's pictures of its student.

    One process without fewstep then samples them all.
    """
    found = {}
    of_the_zoo = any(item.name.endswith("-zoo]") for item in request.session.items if _asks(item))
    for kind, (folder, build, settings) in STUDENTS.items():
        place = tmp_path_factory.mktemp(kind)
        pipeline = build()
        with shaken(network_of(pipeline)):
            config = configured(place / "run", prompts=write_prompts(place), lr=1e-3, **settings)
            run = whole_run(config, "sid", pipeline).bench
            found[kind] = (run, own_images(run))
        if of_the_zoo and (zoo := pytestconfig.getoption("zoo")) is not None:
            call = dict(json.loads((zoo / "manifest.json").read_text())[folder]["call"])
            call = {name: value for name, value in call.items() if name not in ("prompt", "batch_size")}
            pipeline = DiffusionPipeline.from_pretrained(zoo / folder)
            chosen = {**settings, "call": call, "batch_size": 1}
            config = configured(place / "zoo", prompts=write_prompts(place), **chosen)
            run = whole_run(config, "sid", pipeline).bench
            found[f"{kind} of the zoo"] = (run, own_images(run))
    folders = [str(Path(run.config.out) / "student") for run, _ in found.values()]
    run_stock(STOCK, *folders)
    return found


def _asks(item: pytest.Item) -> bool:
    return "students" in getattr(item, "fixturenames", ()) and item.module.__name__ == __name__


def own_images(run: Workbench) -> torch.Tensor:
    """The exported student sampled by the trainer's rollout, (1, H, W, C) in [0, 1]."""
    trained = network_of(DiffusionPipeline.from_pretrained(Path(run.config.out) / "student"))
    student = prepare(run, "sid").roles["student"]
    student.denoiser.network.load_state_dict(trained.state_dict())
    shape = run.recording.sample_shape
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
    # The noise between the steps of the flow pipeline follows the global seed.
    between = torch.Generator().manual_seed(11)

    def step_noise(_k: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=between)

    with torch.no_grad():
        x0 = rollout(student, run.sampler, noise, run.recording.condition(prompts=["a cat"]), step_noise)
    return run.recording.decode(x0).movedim(1, -1)


@pytest.mark.parametrize(
    "place", [pytest.param("", id="own"), pytest.param(" of the zoo", id="zoo", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_sampled_by_stock_diffusers_equals_the_trainers_own_walk(
    students: dict[str, tuple], kind: str, place: str
) -> None:
    if kind + place not in students:
        pytest.skip("no folder of tiny pipelines: give --zoo DIR")
    run, ours = students[kind + place]
    theirs = torch.from_numpy(numpy.load(Path(run.config.out) / "student" / "images.npy"))
    assert (to_uint8(theirs).int() - to_uint8(ours).int()).abs().max() <= 1


def test_a_one_step_student_of_a_table_starts_from_sigma_times_noise(students: dict[str, tuple]) -> None:
    about = json.loads((Path(students["epsilon"][0].config.out) / "student" / "fewstep.json").read_text())
    assert about["scheduler"] == "EulerDiscreteScheduler"
    assert about["initial_scale"] == pytest.approx(0.9286, abs=1e-4)
    assert about["grid"] == [0.626]


def test_a_few_step_student_of_a_flow_moves_by_fresh_noise(students: dict[str, tuple]) -> None:
    about = json.loads((Path(students["flow"][0].config.out) / "student" / "fewstep.json").read_text())
    assert (about["renoise"], about["steps"]) == ("fresh", 4)


def test_an_edm_student_starts_at_its_first_sigma(prompts: str, tmp_path: Path) -> None:
    config = configured(tmp_path, prompts=prompts, steps=1, first_sigma=2.5)
    run = whole_run(config, "sid", tiny_pipelines.tiny_edm()).bench
    sigma = run.sampler.schedule.coefficients(torch.tensor(run.sampler.grid)).sigma
    assert float(sigma[0]) == pytest.approx(2.5, rel=1e-4)


# --- guidance from a recording ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kappas"),
    [
        ({"guidance_scale": 2.0}, (2.0, 2.0, 2.0)),
        ({"guidance_scale": 1.0, "critic_guidance": 1.0, "critic_training_guidance": 0.5}, (0.5, 1.0, 1.0)),
        ({"guidance": "zero"}, (0.0, 0.0, 1.0)),
        ({"guidance": "anti"}, (-1.0, -1.0, 1.0)),
    ],
    ids=["long_short", "short", "zero", "anti"],
)
def test_critic_and_teacher_are_guided_by_the_recordings_negative(
    settings: dict, kappas: tuple, prompts: str, tmp_path: Path
) -> None:
    run = opened(tiny_pipelines.tiny_stable_diffusion(), tmp_path, prompts=prompts, **settings)
    method = prepare(run, "sid")
    scales = (method.critic_in_training, method.critic, method.teacher)
    assert tuple(guided.guidance_scale for guided in scales) == kappas
    assert method.critic.further == 1
    negative, told = run.recording.negative().arguments(), run.conditions.select([0, 1]).others[0].arguments()
    assert all(
        torch.equal(told[name], torch.cat([value, value]))
        for name, value in negative.items()
        if isinstance(value, torch.Tensor)
    )
    if settings == {"guidance": "zero"}:
        whole_run(run.config, "sid", tiny_pipelines.tiny_stable_diffusion())


def test_a_guided_critic_needs_a_teacher_with_guidance(tmp_path: Path) -> None:
    for settings in ({"guidance": "zero"}, {"critic_guidance": 2.0}):
        run = opened(tiny_pipelines.tiny_ddim(), tmp_path, **settings)
        with pytest.raises(UserError, match=f"no negative to guide away from: leave out --{next(iter(settings))}$"):
            prepare(run, "sid")


# --- forms of a run ---------------------------------------------------------------------------------------------------


def test_adapters_under_checkpointing_get_the_gradients_they_get_without_it(prompts: str, tmp_path: Path) -> None:
    """Student, critic and teacher are one network in one graph."""
    pipeline = tiny_pipelines.tiny_stable_diffusion()
    found = []
    with shaken(network_of(pipeline)):
        for checkpointing in (False, True):
            settings = {"prompts": prompts, "lora_rank": 4, "gradient_checkpointing": checkpointing, **ONE_STEP}
            run = opened(pipeline, tmp_path / str(checkpointing), **settings)
            method = prepare(run, "sid")
            for name in ("student", "critic"):  # adapters that do something
                generator = torch.Generator().manual_seed(len(name))
                for parameter in method.roles[name].parameters():
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            b = Batch(2, run.recording.sample_shape, run.conditions.select([0, 1]), Draws(0, 0, range(2)), None, False)
            gradients = {}
            for turn in method.turns(0, b):
                parameters = method.roles[turn.role].parameters()
                torch.autograd.backward([turn.backward[0][0]], inputs=parameters)
                gradients[turn.role] = [p.grad.clone() for p in parameters if p.grad is not None]
                others = [p for name, r in method.roles.items() if name != turn.role for p in r.parameters()]
                assert all(p.grad is None for p in others)
                for parameter in parameters:
                    parameter.grad = None
            found.append(gradients)
    for name in ("student", "critic"):
        assert max(float(g.abs().max()) for g in found[0][name]) > 1e-6
        for ours, theirs in zip(found[0][name], found[1][name]):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("variant", "build", "settings"),
    [
        pytest.param(
            "diffusion_gan", tiny_pipelines.tiny_stable_diffusion, {"prompts": True, **ONE_STEP}, marks=pytest.mark.soak
        ),
        ("diffusion_gan", tiny_pipelines.tiny_flow, {"prompts": True, **FLOW}),
        pytest.param(
            "sida",
            tiny_pipelines.tiny_edm,
            {"prompts": True, "steps": 1, "first_sigma": 2.5},
            marks=pytest.mark.soak,
        ),
        ("sida", tiny_pipelines.tiny_dit, {"classes": "0-3", "steps": 1}),
    ],
    ids=["epsilon", "flow", "edm", "dit"],
)
def test_real_images_train_the_critic_as_a_discriminator(
    variant: str, build: Callable[[], Any], settings: dict, prompts: str, tmp_path: Path
) -> None:
    for name in "0123":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 36), (int(name) * 60, 10, 200)).save(tmp_path / "data" / name / "a.png")
    chosen = {**settings, **({"prompts": prompts} if settings.get("prompts") else {})}
    adversarial = {"data": str(tmp_path / "data"), "adversarial": variant, "lora_rank": 4, "merge": True}
    folder = whole_run(configured(tmp_path / "run", ema_decay=0.5, **adversarial, **chosen), "sid", build()).folder
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row[f"{name}/adversarial"] <= 10 * 100 for row in rows for name in ("critic", "student"))
    assert (folder / "model_index.json").is_file()


def test_interrupted_and_resumed_is_the_same_as_uninterrupted(tmp_path: Path) -> None:
    pipeline = tiny_pipelines.tiny_ddim()
    common = {**TINY_RUN, "steps": 2, "checkpointing_steps": 2, "ema_decay": 0.9, "critic_updates": 2, "max_steps": 5}
    whole = distill(pipeline, "sid", out=str(tmp_path / "whole"), **common)
    distill(pipeline, "sid", out=str(tmp_path / "parts"), **{**common, "max_steps": 3})
    parts = distill(pipeline, "sid", out=str(tmp_path / "parts"), **common, resume=True)
    one, two = (DiffusionPipeline.from_pretrained(folder).unet.state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bf16_trains(prompts: str, tmp_path: Path) -> None:
    settings = {"mixed_precision": "bf16", "gradient_checkpointing": True, "prompts": prompts, **ONE_STEP}
    folder = distill(tiny_pipelines.tiny_stable_diffusion(), "sid", out=str(tmp_path), **TINY_RUN, **settings)
    assert DiffusionPipeline.from_pretrained(folder).unet.dtype == torch.float32
