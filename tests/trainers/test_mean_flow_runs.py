"""MeanFlow's runs: resumed, from real images, and students that sample without this package."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import (
    WAN_CALL,
    dense_wan,
    tiny_ddim,
    tiny_dit,
    tiny_edm,
    tiny_flow,
    tiny_stable_diffusion,
    tiny_wan,
)

import fewstep
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.errors import UserError
from fewstep.eval.models import student_model
from fewstep.export.own_code import is_own_code
from fewstep.kernels import dispatch
from fewstep.pipelines.flow_map import flow_times
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.workbench import open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.mean_flow import MeanFlowConfig
from tests.stock_process import Sampled, sample_stock
from tests.whole_runs import whole_run

RUN = {"steps": 4, "max_steps": 3, "batch_size": 4, "num_pairs": 4, "pair_steps": 2, "apart": 0.75, "lr": 1e-2}
RUN |= {"sample_steps": 0, "report_to": "none", "cpu": True, "log_steps": 1}
FLOW_CALL = {"height": 16, "width": 16, "max_sequence_length": 8}
FAMILIES: dict[str, tuple] = {
    "flow": (tiny_flow, "transformer", {"call": FLOW_CALL, "ema_decay": 0.5, "gradient_accumulation_steps": 2}),
    "flow adapters": (tiny_flow, "transformer", {"call": FLOW_CALL, "lora_rank": 2, "gradient_checkpointing": True}),
    "table": (tiny_stable_diffusion, "unet", {}),
    "v_prediction": (lambda: tiny_stable_diffusion("v_prediction"), "unet", {"variant": "improved"}),
    "edm": (tiny_edm, "unet", {"variant": "alpha_flow", "alpha_last_step": 2}),
    "labels": (tiny_dit, "transformer", {"classes": "0-9", "gradient_checkpointing": True}),
    "video": (dense_wan, "transformer", {"call": WAN_CALL}),
}
#: A flow, a table, one without derivatives, and one that loads stock.
QUICK = ("flow", "table", "edm", "video")


class Finished:
    """A run, its student's folder, and what the trained role makes of one noise at every count."""

    def __init__(self, place: Path, name: str, family: tuple) -> None:
        builder, network, settings = family
        pipeline = builder()
        (place / "prompts.txt").write_text("a cat\na dog\n")
        told = {} if "classes" in settings else {"prompts": str(place / "prompts.txt")}
        self.sampled = Sampled()
        with shaken(pipeline.components[network]):
            settings = MeanFlowConfig(teacher=name, out=str(place / name), **{**RUN, **told, **settings})
            whole = whole_run(settings, "mean_flow", pipeline)
            self.folder, run = whole.folder, whole.bench
            self.about = json.loads((self.folder / "fewstep.json").read_text())
            conditioning = run.conditions.select([3 if name == "labels" else 0])
            generator = torch.Generator().manual_seed(5)
            noise = torch.randn(1, *run.recording.sample_shape, generator=generator)
            self.expected = {}
            for count in self.about["counts"]:
                sampler = Sampler(run.sampler.schedule, run.student.plan.grids[count], "ode", run.sampler.initial_scale)
                with torch.no_grad():
                    self.expected[count] = rollout(whole.role, sampler, noise, conditioning)


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """The student of each family that is asked for, sampled by one process without this package."""
    params = [getattr(item, "callspec", None) for item in request.session.items if item.module.__name__ == __name__]
    asked = {one.params.get("name") for one in params if one is not None} | {"table"}
    return sampled_elsewhere(
        tmp_path_factory.mktemp("mean_flow"), {name: FAMILIES[name] for name in FAMILIES if name in asked}
    )


def sampled_elsewhere(place: Path, families: dict[str, tuple]) -> dict[str, Finished]:
    """A student of each family, and what one process without this package samples from it."""
    found = {name: Finished(place, name, family) for name, family in families.items()}
    folders = [one.folder for one in found.values()]
    for one, sampled in zip(found.values(), sample_stock(place / "sampled.npz", *folders), strict=True):
        one.sampled = sampled
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.soak) for name in FAMILIES]
)
def test_a_student_samples_without_this_package_as_it_was_trained(finished: dict[str, Finished], name: str):
    check_sampled(finished[name])


@pytest.mark.parametrize(
    "name", ["StableDiffusion3", *(pytest.param(name, marks=pytest.mark.soak) for name in ("Sana", "Wan"))]
)
def test_so_do_students_of_the_zoo(name: str, zoo: Path, tmp_path: Path, pytestconfig: pytest.Config):
    if not pytestconfig.option.zoo_given:
        pytest.skip("one of them takes seconds: give --zoo")
    call = dict(json.loads((zoo / "manifest.json").read_text())[name]["call"])
    call.pop("prompt")
    family = (lambda: DiffusionPipeline.from_pretrained(zoo / name), "transformer", {"call": call})
    check_sampled(sampled_elsewhere(tmp_path, {name: family})[name])


def check_sampled(student: Finished) -> None:
    """At every count the folder samples what the role does."""
    assert {1, 2, 4} <= set(student.about["counts"])
    stock = student.about["pipeline"] == "AnyFlowPipeline"  # Wan's needs no code of ours; its frames come first
    assert student.about.get("code") == (None if stock else "flow_map.py") and student.about["renoise"] == "ode"
    assert is_own_code(student.folder) != stock
    for count, expected in student.expected.items():
        found, scale = student.sampled.latents[count], float(expected.abs().max())
        found = found.transpose(1, 2) if stock else found
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 * scale)


def test_fewstep_loads_its_own_flow_maps_unasked_and_no_other(finished: dict[str, Finished], tmp_path: Path):
    student = Path(shutil.copytree(finished["table"].folder, tmp_path / "student"))
    pipeline = fewstep.load(student)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type="np").images
    assert image.shape == (1, 16, 16, 3)
    pipeline.save_pretrained(tmp_path / "copy")
    assert is_own_code(tmp_path / "copy")
    assert student_model(student).pipeline_class().__name__ == "StableDiffusionPipeline"
    for code in (student / "flow_map.py", student / "second_time" / "flow_map.py"):
        text = code.read_text()
        code.write_text(text + "\nimport os\n")
        assert not is_own_code(student)
        with pytest.raises(UserError, match="trust_remote_code"):
            fewstep.load(student)
        code.write_text(text)
    assert is_own_code(student)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path):
    settings = {**RUN, "ema_decay": 0.5, "checkpointing_steps": 1}
    pipeline = tiny_ddim()
    with dispatch.counted() as ran:
        folders = [distill(pipeline, "mean_flow", out=str(tmp_path / "whole"), **settings)]
    # Its four modules of attention, where it is tried first, and where the times differ in three steps.
    assert ran["dual_attention", "closed"] >= 8 and ran["dual_attention", "closed"] % 4 == 0
    distill(pipeline, "mean_flow", out=str(tmp_path / "cut"), **{**settings, "max_steps": 1})
    folders.append(distill(pipeline, "mean_flow", out=str(tmp_path / "cut"), resume=True, **settings))
    from safetensors.torch import load_file

    for part in ("unet", "second_time"):
        whole, cut = (load_file(folder / part / "diffusion_pytorch_model.safetensors") for folder in folders)
        assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(float(value.abs().max()) > 0 for name, value in whole.items() if name.startswith("heads"))
    # And another run begins with the second time of this one, from its checkpoint or its folder.
    for number, init in enumerate((tmp_path / "whole", folders[0])):
        own = {"out": str(tmp_path / f"next_{number}"), "init": str(init), "trust_remote_code": True, **settings}
        bench = open_workbench(MeanFlowConfig(teacher="tiny", **own), "cpu", pipeline)
        again = prepare(bench, "mean_flow").roles["student"].added["second_time"]
        assert bool((again.heads[0].weight != 0).any())


def test_a_student_of_real_images_starts_as_its_teacher_and_is_guided_in_training(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for k in range(2):
        Image.new("RGB", (16, 16), (50, 90 * k, 200)).save(tmp_path / "images" / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": f"a {k}"} for k in range(2)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    folder = distill(
        tiny_stable_diffusion(),
        "mean_flow",
        out=str(tmp_path / "run"),
        data=str(tmp_path / "images"),
        prompts=str(tmp_path / "prompts.txt"),
        kappa=0.5,
        **RUN,
    )
    assert (folder / "second_time" / "config.json").is_file()


def test_several_networks_that_share_the_time_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="WanPipeline has 2 networks that share the time") as caught:
        distill(
            tiny_wan(),
            "mean_flow",
            out=str(tmp_path / "run"),
            prompts=str(tmp_path / "prompts.txt"),
            call=WAN_CALL,
            **RUN,
        )
    assert "\n" not in str(caught.value)


def test_a_step_towards_noise_is_refused():
    class Backwards:
        sigmas = torch.tensor([0.2, 0.9, 0.0])

    with pytest.raises(ValueError, match="may not end at a noisier time"):
        flow_times(Backwards())
