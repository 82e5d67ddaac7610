"""MeanFlow's own class and runs: times, velocities, targets, refusals, and students without this package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import WAN_CALL, tiny_ddim, tiny_dit, tiny_edm, tiny_flow, tiny_stable_diffusion, tiny_wan
from torch import Tensor, nn
from toys import TinyNetwork, labels, role

import fewstep
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.eval.models import student_model
from fewstep.export.own_code import is_own_code
from fewstep.networks.flow_map import FlowMapDenoiser, gap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.pipelines.flow_map import flow_times
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.planning.call_counts import CallCounter, forward_passes
from fewstep.programs.workbench import open_workbench
from fewstep.recording.shake import shaken
from fewstep.trainers.mean_flow import MeanFlow, MeanFlowConfig
from tests.end_to_end.test_phased import dense_wan
from tests.floors import declared
from tests.whole_runs import whole_run

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"flow": FlowSchedule(), "epsilon": TABLE, "edm": EDMSchedule()}
GRID = (1.0, 0.5)


def config(**settings) -> MeanFlowConfig:
    return MeanFlowConfig(teacher="tiny", out="out", **settings)


class Telling(nn.Module):
    """Adds the gap, times a number, to what the network sees of the label."""

    @contextmanager
    def on(self, network: nn.Module, gap: Callable[[], Tensor]) -> Iterator[None]:
        handle = network.register_forward_pre_hook(
            lambda _module, arguments, named: (arguments, {**named, "label": named["label"] + gap().float()}),
            with_kwargs=True,
        )
        try:
            yield
        finally:
            handle.remove()


def method(kind: str = "flow", settings: MeanFlowConfig | None = None, guidance_scale: float = 1.0) -> MeanFlow:
    """Over vectors of 6 with labels."""
    schedule = SCHEDULES[kind]
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in ("teacher", "student")}
    roles["student"].denoiser = FlowMapDenoiser(roles["student"].denoiser, Telling())
    guided = GuidedDenoiser(roles["teacher"], labels([0.0]), guidance_scale)
    return MeanFlow(settings or config(), roles, guided, Sampler(schedule, GRID, "ode", schedule.initial_scale()))


def batch(count: int = 8, step: int = 0) -> Batch:
    draws, x0 = Draws(0, step, range(count)), torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    told = labels([1.0] * count)
    return Batch(count, (6,), told, draws, Real(x0, told), False, Pairs(x0, x0, told))


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
def test_where_both_times_are_one_it_is_flow_matching(kind: str):
    trained = method(kind, config(data="images", weighting="uniform", apart=1e-9))
    (turn,) = trained.turns(0, batch())
    ((loss, gradient),) = turn.backward
    flow = trained.flow(batch(), [])
    u = trained.student.velocity(flow.x_t, flow.t, flow.conditioning, flow.t)
    given = batch()
    expected = (u - (given.draws.normal("noise", (6,)) - given.real.x0)).square().sum(1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert gradient is None


def test_the_teachers_velocity_is_guided_in_diffusers_convention():
    trained = method("flow", guidance_scale=3.0)
    flow = trained.flow(batch(), [])
    teacher = trained.roles["teacher"].denoiser
    positive, negative = (teacher.raw(flow.x_t, flow.t, labels([label] * 8)) for label in (1.0, 0.0))
    torch.testing.assert_close(flow.velocity, negative + 3 * (positive - negative))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({}, (3.0, 0.0)),
        ({"kappa": 0.5}, (1.5, 0.5)),
        ({"omega": 0.2, "kappa": 0.92}, (0.2, 0.92)),
        ({"variant": "improved"}, (1.0, 2 / 3)),
    ],
)
def test_guidance_in_training_is_mixed_as_its_papers_say(settings: dict, numbers: tuple[float, float]):
    """omega v + kappa u_c + (1 - omega - kappa) u_null; samples without condition, or beyond the interval, have v."""
    trained = method("flow", config(data="images", guidance_t_max=0.6, label_drop=0.4, **settings), 3.0)
    assert (trained.guide.omega, trained.guide.kappa) == pytest.approx(numbers)
    flow, given = trained.flow(batch(64), []), batch(64)
    data = given.draws.normal("noise", (6,)) - given.real.x0
    dropped = torch.tensor(given.draws.coins("label_drop", 0.4))
    assert torch.equal(flow.conditioning.arguments()["label"], 1.0 - dropped.float())
    u_c, u_null = (trained.student.velocity(flow.x_t, flow.t, labels([label] * 64), flow.t) for label in (1.0, 0.0))
    guided = numbers[0] * data + numbers[1] * u_c + (1 - sum(numbers)) * u_null
    on = (~dropped & (flow.t <= 0.6))[:, None]
    assert 5 < int(on.sum()) < 60
    torch.testing.assert_close(flow.velocity, torch.where(on, guided, data).detach())


def test_the_fixed_point_of_guidance_in_training_is_the_guided_flow():
    omega, kappa = config(data="x", kappa=0.6).self_guidance(2.5)
    v, u_null = 1.7, 0.4
    u = v
    for _ in range(200):
        u = omega * v + kappa * u + (1 - omega - kappa) * u_null
    assert u == pytest.approx(u_null + 2.5 * (v - u_null))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_target_over_an_interval_is_the_mean_flow_identity(kind: str):
    trained = method(kind)
    flow = trained.flow(batch(), list(range(8)))
    asked = trained.interval(0, flow)
    expected = flow.velocity - gap(trained.schedule, flow.t, flow.r).float()[:, None] * asked.change
    assert asked.weight == 1
    torch.testing.assert_close(asked.target, expected, rtol=1e-5, atol=1e-5)
    assert not asked.target.requires_grad and asked.u.requires_grad
    warmed = method(kind, config(tangent_warmup=100)).interval(0, flow)
    torch.testing.assert_close(warmed.target, flow.velocity)


def test_a_log_has_the_same_names_whether_times_differ_or_not():
    """Processes add theirs up, and each has coins of its own."""
    logs = [next(method("flow", config(apart=apart)).turns(0, batch())).log for apart in (1e-9, 1.0)]
    assert list(logs[0]) == list(logs[1])


def test_an_alpha_that_falls_until_the_last_step_holds_on_to_it():
    alpha = config(variant="alpha_flow")
    assert alpha.follows_max_steps and not config().follows_max_steps
    assert not config(variant="alpha_flow", alpha_last_step=500).follows_max_steps


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_pass_teaches_what_two_do(kind: str):
    gradients = []
    for checkpointing in (False, True):
        trained = method(kind, config(apart=0.3, gradient_checkpointing=checkpointing))
        assert trained.one_pass != checkpointing
        (turn,) = trained.turns(0, batch(16))
        gradients.append(torch.autograd.grad(turn.backward[0][0], list(trained.roles["student"].parameters())))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_alpha_flow_asks_the_student_further_along_the_flow():
    trained = method("epsilon", config(variant="alpha_flow", max_steps=100))
    assert [trained.config.alpha(step) for step in (0, 50, 99)] == [1.0, 0.5, 0.0] and trained.config.differentiates
    kept = config(variant="alpha_flow", max_steps=100, alpha_min=0.1)
    assert [kept.alpha(step) for step in (0, 50, 99)] == [1.0, 0.5, 0.1] and not kept.differentiates
    flow = trained.flow(batch(), list(range(8)))
    asked = trained.interval(50, flow)
    distance = 0.5 * gap(trained.schedule, flow.t, flow.r)
    later = trained.student.later_velocity(flow.x_t, flow.t, flow.conditioning, flow.r, flow.velocity, distance)
    torch.testing.assert_close(asked.target, 0.5 * flow.velocity + 0.5 * later)
    assert asked.weight == 0.5 and not asked.target.requires_grad
    assert torch.equal(trained.interval(0, flow).target, flow.velocity)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_further_along_the_flow_lies_the_same_sample_with_less_of_the_same_noise(kind: str):
    trained, given = method(kind), batch()
    schedule, student, told = trained.schedule, trained.student, given.conditioning
    x0, noise = given.real.x0, given.draws.normal("noise", (6,))
    t, r = trained.times.draw(given.draws, range(8))
    distance = 0.5 * gap(schedule, t, r)
    s = schedule.time_from_flow_time(schedule.flow_time(t) - distance)
    x_t, x_s = (add_noise(x0, noise, schedule.coefficients(time)) for time in (t, s))
    later = student.later_velocity(x_t, t, told, r, noise - x0, distance)
    torch.testing.assert_close(later, student.velocity(x_s, s, told, r), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
@pytest.mark.parametrize(
    ("settings", "scale", "passes"),
    [
        # F 1, backward 2; from data the one without condition; a tangent (1) where the times differ.
        ({"data": "images"}, 3.0, 1 + 2 + 1),
        ({"data": "images", "kappa": 0.5}, 3.0, 1 + 2 + 2),
        ({"data": "images"}, 1.0, 1 + 2),
        ({}, 3.0, 1 + 2 + 2),
    ],
)
def test_a_step_costs_what_it_declares_and_derivatives_only_where_the_times_differ(
    settings: dict, scale: float, passes: int, one_pass: bool
):
    """4.25 forward passes from data where a quarter of the times differs; 4.5 where blocks run again backwards."""
    trained = method("flow", config(apart=0.25, gradient_checkpointing=not one_pass, **settings), scale)
    counter, shares = CallCounter(trained), []
    with counter:
        for step in range(40):
            for turn in trained.turns(step, batch(step=step)):
                torch.autograd.backward(*zip(*turn.backward, strict=True), inputs=trained.roles["student"].parameters())
    for step in range(40):
        found = counter.calls(step)
        assert declared(trained, step, batch(step=step)) == found
        assert counter.wasted(step) == {}
        student = found["student"]
        assert (student.jvp if one_pass else student.jvp_to_parameters) == 0
        shares.append(student.jvp + student.jvp_to_parameters)
        assert forward_passes(found) == pytest.approx(passes + (1 if one_pass else 2) * shares[-1])
    assert sum(shares) / 40 == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "sideways"}, "--variant must be one of mean_flow, alpha_flow, improved"),
        ({"weighting": "cube"}, "--weighting must be one of"),
        ({"velocity": "data"}, "--velocity data is that of real images: give --data"),
        ({"kappa": 0.5}, "a teacher has --guidance_scale"),
        ({"data": "x", "kappa": 1.0}, r"--kappa must be in \[0, 1\)"),
        ({"data": "x", "pairs": "y"}, "give --data or --pairs, not both"),
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"apart": 0.0}, r"--apart must be in \(0, 1\]"),
        ({"time_std": 0.0}, "--time_std must be positive"),
        ({"guidance_t_min": 0.8, "guidance_t_max": 0.2}, "must be a range"),
        ({"variant": "alpha_flow", "alpha_first_step": 5, "alpha_last_step": 5}, "must lie behind"),
        ({"variant": "alpha_flow", "alpha_min": 1.5}, r"--alpha_min must be in \[0, 1\]"),
        ({"label_drop": 1.0}, r"--label_drop must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**settings)


# --- runs -------------------------------------------------------------------------------------------------------------

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
STOCK = """
import json, sys
sys.modules["fewstep"] = None
import diffusers, numpy, torch
torch.set_num_threads(1)
out, *folders = sys.argv[1:]
saved = {}
for folder in folders:
    about = json.load(open(f"{folder}/fewstep.json"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    told = {"prompt": {"prompt": "a cat"}, "label": {"class_labels": [3]}, None: {}}[about["conditional"]]
    last, step = [], pipeline.scheduler.step
    for count in about["counts"]:
        kept = []
        type(pipeline.scheduler).step, original = (
            lambda self, *a, **k: kept.append(original(self, *a, **k)) or kept[-1]), type(pipeline.scheduler).step
        type(pipeline.scheduler).step.__signature__ = __import__("inspect").signature(original)
        call = {**about["call"], **told, "num_inference_steps": count}
        pipeline(**call, generator=torch.Generator().manual_seed(5))
        type(pipeline.scheduler).step = original
        found = kept[-1]
        saved[f"{folder} {count}"] = (found[0] if isinstance(found, tuple) else found.prev_sample).float().numpy()
numpy.savez(out, **saved)
"""


class Finished:
    """A run, its student's folder, and what the trained role makes of one noise at every count."""

    def __init__(self, place: Path, name: str, family: tuple) -> None:
        builder, network, settings = family
        pipeline = builder()
        (place / "prompts.txt").write_text("a cat\na dog\n")
        told = {} if "classes" in settings else {"prompts": str(place / "prompts.txt")}
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
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Every family's student, sampled by one process without this package."""
    return sampled_elsewhere(tmp_path_factory.mktemp("mean_flow"), FAMILIES)


def sampled_elsewhere(place: Path, families: dict[str, tuple]) -> dict[str, Finished]:
    """A student of each family, and what one process without this package samples from it."""
    found = {name: Finished(place, name, family) for name, family in families.items()}
    words = [sys.executable, "-W", "ignore", "-c", STOCK, place / "seen.npz", *(one.folder for one in found.values())]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    with numpy.load(place / "seen.npz") as file:
        for one in found.values():
            one.seen = {count: torch.from_numpy(file[f"{one.folder} {count}"]) for count in one.about["counts"]}
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_samples_without_this_package_as_it_was_trained(finished: dict[str, Finished], name: str):
    check_sampled(finished[name])


@pytest.mark.parametrize("name", ["StableDiffusion3", "Sana", "Wan"])
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
    assert student.about["code"] == "flow_map.py" and student.about["renoise"] == "ode"
    assert is_own_code(student.folder)
    for count, expected in student.expected.items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(student.seen[count], expected, rtol=1e-3, atol=2e-3 * scale)


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
    folders = [distill(pipeline, "mean_flow", out=str(tmp_path / "whole"), **settings)]
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
