"""Rectified flow's own class and runs: times, lines, losses, and students that stock diffusers loads and samples."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import tiny_ddim, tiny_edm, tiny_flow, tiny_stable_diffusion
from torch import Tensor, nn
from toys import Labels, TinyNetwork, labels, make_loop, role

from fewstep.data.batch import Batch, Pairs
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, TableSchedule
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.networks.perceptual import PerceptualDistance, images_of, lpips_of
from fewstep.programs import distillation
from fewstep.programs.distillation import distill
from fewstep.programs.planning.call_counts import Calls
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fewstep.training.loop import Loop
from tests.whole_runs import whole_run

TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES = {"flow": FlowSchedule(), "epsilon": TABLE, "edm": EDMSchedule()}
GRID = (1.0, 0.75, 0.5, 0.25)


def config(out: Path | str = "unused", **settings) -> RectifiedFlowConfig:
    defaults = {"batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3}
    return RectifiedFlowConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


def method(kind: str = "flow", settings: RectifiedFlowConfig | None = None, perceptual=None) -> RectifiedFlow:
    """Over vectors of 6 with labels."""
    schedule = SCHEDULES[kind]
    torch.manual_seed(0)
    roles = {name: role(name, TinyNetwork(6), schedule, kind, name == "student") for name in ("teacher", "student")}
    return RectifiedFlow(
        settings or config(), roles, Sampler(schedule, GRID, "ode", schedule.initial_scale()), perceptual
    )


class Vectors:
    """Pairs that a certain line joins: x0 = noise / 2 + label."""

    def batch(self, seed: int, positions) -> Pairs:
        noise = Draws(seed, -9, list(positions)).normal("noise", (6,))
        values = torch.tensor([float(position % 3) for position in positions])
        return Pairs(noise / 2 + values[:, None], noise, labels(values))


def batch(count: int = 4, step: int = 0) -> Batch:
    pairs = Vectors().batch(0, range(count))
    return Batch(count, (6,), pairs.conditioning, Draws(0, step, range(count)), None, False, pairs)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("times", ["u_shaped", "uniform", "logit_normal", "grid"])
def test_times_lie_where_the_student_may_be_asked(kind: str, times: str):
    trained = method(kind, config(times=times))
    t = trained.times(batch(500))
    assert t.dtype == torch.float64 and t.shape == (500,)
    assert bool((t >= 0).all() and (t <= 1).all())
    if times == "grid":
        assert set(t.tolist()) == set(GRID)
    else:
        assert len(set(t.tolist())) > 150
        torch.testing.assert_close(t, trained.schedule.snap(t), rtol=0, atol=0)
        share = (trained.schedule.flow_time(t) - trained.lowest) / (trained.highest - trained.lowest)
        middle = float(((share - 0.5).abs() < 0.25).double().mean())
        assert middle == pytest.approx({"u_shaped": 0.32, "uniform": 0.5, "logit_normal": 0.73}[times], abs=0.07)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_line_begins_where_the_sampler_starts(kind: str):
    trained, pairs = method(kind), batch().pairs
    noise = trained.line_noise(pairs)
    start = add_noise(pairs.x0, noise, trained.schedule.coefficients(trained.sampler.times(0, noise)))
    torch.testing.assert_close(start, trained.sampler.initial_scale * pairs.noise, rtol=1e-5, atol=1e-4)
    if kind == "flow":
        assert torch.equal(noise, pairs.noise)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_student_that_is_right_walks_to_the_pairs_sample_in_any_number_of_steps(kind: str):
    trained, pairs = method(kind), batch().pairs

    def right(x_t: Tensor, t: Tensor, conditioning, end: Tensor | None = None) -> Tensor:
        seen.append(x_t)
        return pairs.x0

    for grid in ((1.0,), GRID):
        seen: list[Tensor] = []
        sampler = Sampler(trained.schedule, grid, "ode", trained.sampler.initial_scale)
        torch.testing.assert_close(rollout(right, sampler, pairs.noise, pairs.conditioning), pairs.x0)
        # What it is asked on the way is what it was trained on.
        for step, x_t in enumerate(seen):
            t = sampler.times(step, x_t)
            line = add_noise(pairs.x0, trained.line_noise(pairs), trained.schedule.coefficients(t))
            torch.testing.assert_close(x_t, line, rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_right_student_is_zero_and_only_the_student_learns():
    trained = method()
    assert declared(trained, 0, batch()) == {"student": Calls(to_parameters=1)}
    (turn,) = trained.turns(0, batch())
    assert turn.role == "student"
    ((loss, gradient),) = turn.backward
    assert loss.shape == () and gradient is None and loss.requires_grad
    x0 = batch().pairs.x0
    for settings in ({"loss": "l2"}, {"loss": "huber"}, {"time_weight": "1-t"}):
        exact, _ = method(settings=config(**settings)).distance(x0, x0.clone(), torch.full((4,), 0.5))
        assert float(exact) == pytest.approx(0, abs=1e-7)


def test_weights_and_perceptual_terms_are_as_stated():
    x0, student, flow_time = torch.zeros(2, 6), torch.ones(2, 6), torch.tensor([0.5, 0.25], dtype=torch.float64)

    def loss(perceptual=None, **settings) -> float:
        return float(method(settings=config(**settings), perceptual=perceptual).distance(x0, student, flow_time)[0])

    assert loss(loss="l2") == pytest.approx((4 + 16) / 2)  # the error of x0 over the time, squared
    assert loss(loss="l2", time_weight="1-t") == pytest.approx((0.5 * 4 + 0.75 * 16) / 2)
    constant = torch.tensor([3.0, 3.0])
    with_lpips = {"loss": "l2", "perceptual_weight": 2.0}
    assert loss(lambda a, b: constant, **with_lpips) == pytest.approx(10 + 2 * 3)
    assert loss(lambda a, b: constant, **with_lpips, perceptual_over_t=True) == pytest.approx(10 + 2 * (6 + 12) / 2)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_training_brings_the_students_lines_closer(kind: str, tmp_path: Path):
    settings = config(tmp_path, max_steps=150, batch_size=32, lr=3e-3, checkpointing_steps=500, sample_steps=0)
    trained = method(kind, settings)
    make_loop(trained, settings, conditions=Labels(), pairs=Vectors()).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["student/flow"] for row in rows]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


# --- runs ------------------------------------------------------------------------------------------------------------

# Sample grids would take longer than such runs.
TINY = {"max_steps": 2, "batch_size": 2, "num_pairs": 6, "pair_steps": 2, "sample_steps": 0}
TINY |= {"report_to": "none", "cpu": True}
FAMILIES = {
    "flow": (tiny_flow, {"call": {"max_sequence_length": 8}}),
    "table": (tiny_stable_diffusion, {}),
    "v_prediction": (lambda: tiny_stable_diffusion("v_prediction"), {}),
    "edm": (tiny_edm, {}),
}
EVERY = ["flow", "table", *(pytest.param(family, marks=pytest.mark.soak) for family in ("v_prediction", "edm"))]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return str(path)


@pytest.mark.parametrize("family", EVERY)
def test_a_reflowed_student_loads_stock_and_samples_as_it_was_trained(family: str, prompts: str, tmp_path: Path):
    builder, extra = FAMILIES[family]
    pipeline = builder()
    network = pipeline.components.get("unet") or pipeline.components["transformer"]
    with shaken(network):
        settings = RectifiedFlowConfig(
            teacher=family, out=str(tmp_path), prompts=prompts, steps=2, lr=1e-3, **TINY, **extra
        )
        whole = whole_run(settings, "rectified_flow", pipeline)
        folder, run = whole.folder, whole.bench
        about = json.loads((folder / "fewstep.json").read_text())
        stock = DiffusionPipeline.from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        student = RectifiedFlow.prepare(settings, run).student
        student.denoiser.network.load_state_dict(stock.components[about["component"]].state_dict())
    assert about["renoise"] == "ode" and {"pairs", "inverted_pairs"}.isdisjoint(about["training"])
    assert set(about["counts"]) == {1, 2}
    for count in (1, 2):
        call = {**about["call"], "num_inference_steps": count, "output_type": "np"}
        theirs = stock("a cat", **call, generator=torch.Generator().manual_seed(5)).images
        noise = torch.randn(1, *run.recording.sample_shape, generator=torch.Generator().manual_seed(5))
        sampler = Sampler(run.sampler.schedule, tuple(about["grids"][str(count)]), "ode", run.sampler.initial_scale)
        with torch.no_grad():
            x0 = rollout(student, sampler, noise, run.recording.condition(prompts=["a cat"]))
        ours = run.recording.decode(x0).movedim(1, -1)
        assert float((torch.from_numpy(theirs) - ours).abs().max()) < 1 / 255


def test_a_lora_run_with_an_average_and_accumulation_resumes(prompts: str, tmp_path: Path):
    settings = {**TINY, "prompts": prompts, "steps": 1, "lora_rank": 2, "ema_decay": 0.5, "lr": 1e-2}
    settings |= {"gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    whole = distill(tiny_stable_diffusion(), "rectified_flow", out=str(tmp_path / "whole"), **settings)
    # The pairs that the first run made, by the backbone under its adapters, are pairs of the teacher.
    parts = {**settings, "out": str(tmp_path / "parts"), "pairs": str(tmp_path / "whole" / "pairs")}
    distill(tiny_stable_diffusion(), "rectified_flow", **{**parts, "max_steps": 1})
    again = distill(tiny_stable_diffusion(), "rectified_flow", **parts, resume=True)
    one, two = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (whole, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_is_stopped_while_it_makes_its_pairs_goes_on_with_them(tmp_path: Path, monkeypatch):
    from fewstep.data import pairs

    made, write = [], pairs.Shards.write

    def fail_at_the_second(self, number: int, tensors) -> None:
        if number == 1 and len(made) == 1:
            raise KeyboardInterrupt
        made.append(number)
        write(self, number, tensors)

    monkeypatch.setattr(pairs.Shards, "write", fail_at_the_second)
    settings = {**TINY, "out": str(tmp_path / "run"), "num_pairs": 600, "pair_steps": 1, "batch_size": 256}
    settings["max_steps"] = 3  # which use all of them
    with pytest.raises(KeyboardInterrupt):
        distill(tiny_ddim(), "rectified_flow", **settings)
    monkeypatch.setattr(pairs.Shards, "write", lambda self, *rest: (made.append(rest[0]), write(self, *rest)))
    with pytest.raises(UserError, match="--resume"):
        distill(tiny_ddim(), "rectified_flow", **settings)
    distill(tiny_ddim(), "rectified_flow", **settings, resume=True)
    assert made == [0, 1, 2]


def test_real_images_join_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(data / f"{number}.png")
    settings = {**TINY, "data": str(data), "inverted_share": 0.9, "max_steps": 4, "batch_size": 50}
    loops: list[Loop] = []
    monkeypatch.setattr(distillation, "Loop", lambda *given, **named: loops.append(Loop(*given, **named)) or loops[0])
    distill(tiny_ddim(), "rectified_flow", out=str(tmp_path / "run"), **settings)
    batches = loops[0].batches
    assert batches.real is None  # no image is read in a step
    drawn = batches.pairs.batch(0, range(200)).x0
    flat = (drawn.amax((2, 3)) - drawn.amin((2, 3))).amax(1) < 1e-6
    assert 160 < int(flat.sum()) < 198
    reds = {round(float(x0[0, 0, 0]) * 127.5 + 127.5) for x0 in drawn[flat]}
    assert reds == {0, 80, 160}


# --- perceptual distance ---------------------------------------------------------------------------------------------


class FakeLpips(nn.Module):
    """What the lpips package offers, with one fixed layer in the place of VGG."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg"
        self.layer = nn.Conv2d(3, 2, 3)

    def forward(self, a: Tensor, b: Tensor, normalize: bool) -> Tensor:
        assert normalize and a.shape[1:] == b.shape[1:] == (3, 224, 224)
        return (self.layer(a) - self.layer(b)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lpips")
    module.LPIPS = FakeLpips
    monkeypatch.setitem(sys.modules, "lpips", module)


@pytest.mark.parametrize("builder", [tiny_ddim, tiny_stable_diffusion], ids=["pixels", "latents"])
def test_lpips_compares_the_pipelines_images_with_gradient(builder, lpips: None):
    recording = record(builder())
    x0 = (torch.randn(2, *recording.sample_shape) / 4).requires_grad_()
    images = images_of(recording)(x0)
    torch.testing.assert_close(images.clamp(0, 1).detach(), recording.decode(x0.detach()), rtol=0, atol=5e-3)
    distance = lpips_of(recording, "cpu")
    assert isinstance(distance, PerceptualDistance)
    apart = distance(x0, torch.zeros_like(x0))
    assert apart.shape == (2,) and bool((apart > 0).all())
    assert distance(x0, x0).abs().max() == 0
    apart.sum().backward()
    assert x0.grad.abs().sum() > 0


def test_a_run_with_lpips_trains(lpips: None, tmp_path: Path):
    settings = {**TINY, "perceptual_weight": 1.0, "time_weight": "1-t", "perceptual_over_t": True}
    distill(tiny_ddim(), "rectified_flow", out=str(tmp_path), log_steps=1, **settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["student/perceptual"] > 0 for row in rows)


def test_without_the_package_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install .fewstep\[perceptual\]"):
        distill(tiny_ddim(), "rectified_flow", out=str(tmp_path), **TINY, perceptual_weight=1.0)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"renoise": "fresh"}, "--renoise must be ode"),
        ({"times": "late"}, "--times must be one of u_shaped, uniform"),
        ({"loss": "l1"}, "--loss must be one of huber, l2"),
        ({"pair_solver": "rk45"}, "--pair_solver must be one of euler, heun"),
        ({"num_pairs": 0}, "--num_pairs must be at least 1"),
        ({"inverted_share": 1.0}, "--inverted_share must be between 0 and 1"),
        ({"time_min": 0.0}, "--time_min must be between 0 and 1"),
        ({"u_steepness": 0.0}, "--u_steepness must be positive"),
        ({"perceptual_over_t": True}, "give --perceptual_weight"),
        ({"times": "grid", "time_weight": "1-t"}, "nothing to learn"),
        ({"data": "fashion", "inverted_pairs": "pairs"}, "leave out --data"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, said: str):
    with pytest.raises(UserError, match=said) as error:
        config(**settings)
    assert "\n" not in str(error.value)


def test_pairs_of_another_guidance_are_refused(tmp_path: Path, prompts: str):
    from fewstep.programs.pairs import make_pairs

    pairs = make_pairs(
        tiny_stable_diffusion(),
        out=str(tmp_path / "pairs"),
        prompts=prompts,
        guidance_scale=2.0,
        num=2,
        teacher_steps=1,
        cpu=True,
    )
    common = {**TINY, "out": str(tmp_path / "run"), "prompts": prompts, "pairs": str(pairs)}
    with pytest.raises(UserError, match=r"made at guidance 2\.0, and here it is 3\.0; give --guidance_scale 2\.0"):
        distill(tiny_stable_diffusion(), "rectified_flow", **common, guidance_scale=3.0)
    with pytest.raises(UserError, match="were made from noise, and images is asked for"):
        distill(tiny_stable_diffusion(), "rectified_flow", **common, inverted_pairs=str(pairs), inverted_share=0.5)
    distill(tiny_stable_diffusion(), "rectified_flow", **common)
