"""A teacher of two networks that share the time, and its students of two networks: trained, shipped, walked stock."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import WAN_CALL, tiny_wan

from fewstep.cli import main
from fewstep.data.batch import Batch
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.rollout import rollout
from fewstep.diffusion.strategic import Move
from fewstep.errors import UserError
from fewstep.eval.bench.floors import declared
from fewstep.export.apply import apply
from fewstep.export.errors import SchedulerCheckError
from fewstep.export.walk.plan import check_student, plan_student
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import Role
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.planning.call_counts import CallCounter
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording import record
from fewstep.recording.pipeline import with_parts
from fewstep.recording.watch.shake import shaken
from tests.checkpoints import load_latest
from tests.stock_process import run_stock

EXPERTS = ("transformer", "transformer_2")
RUN = {"steps": 4, "max_steps": 2, "batch_size": 2, "log_steps": 1, "report_to": "none", "cpu": True}
RUN |= {"critic_updates": 1, "lr": 1e-2, "sample_steps": 0, "call": {**WAN_CALL, "guidance_scale_2": 3.0}}
LORA = {"lora_rank": 4, "lora_alpha": 8.0}
HALF = {"mixed_precision": "bf16", "gradient_checkpointing": True}

# Runs with only stock diffusers; the video's latents, and which networks gave them.
STOCK = """
import json, sys
import diffusers, numpy, torch
base, out, saved = sys.argv[1], sys.argv[2], {}
for form in ("full", "lora", "lora_by_pipeline", "merged"):
    folder = f"{out}/{'lora' if 'lora' in form or form == 'merged' else 'full'}/student" + "_lora" * ("lora" in form)
    about = json.load(open(f"{folder}/fewstep.json"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base if "lora" in form else folder)
    if "lora" in form:
        pipeline.load_lora_weights(folder, weight_name=about["lora"]["file"])
        file = about["lora"]["further_files"]["transformer_2"]
        if form == "lora":
            pipeline.transformer_2.load_lora_adapter(folder, prefix="transformer", weight_name=file)
        else:
            pipeline.load_lora_weights(folder, weight_name=file, load_into_transformer_2=True)
        scheduler = getattr(diffusers, about["scheduler"])
        pipeline.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    for name in ("transformer", "transformer_2"):
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    for count in about["counts"]:
        call = {**about["call"], "prompt": "a cat", "num_inference_steps": count, "output_type": "latent"}
        calls.clear()
        latents = pipeline(**call, generator=torch.Generator().manual_seed(5)).frames
        saved[f"{form} {count}"] = latents.float().numpy()
        saved[f"{form} {count} calls"] = numpy.array(calls)
numpy.savez(f"{out}/seen.npz", **saved)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shaken teacher of two experts, and prompts."""
    place = tmp_path_factory.mktemp("experts")
    pipeline = tiny_wan()
    with shaken(pipeline.transformer, pipeline.transformer_2):
        pipeline.save_pretrained(place / "base")
    (place / "prompts.txt").write_text("a cat\na small dog\n", encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """Full copies and adapters, through the command line; then sampled in a process without fewstep."""
    words = ["distill", "dmd2", "--teacher", str(place / "base"), "--prompts", str(place / "prompts.txt")]
    for name, value in RUN.items():
        words += (
            [f"--{name}", json.dumps(value) if name == "call" else str(value)] if value is not True else [f"--{name}"]
        )
    assert main([*words, "--out", str(place / "full")]) == 0
    assert main([*words, "--out", str(place / "lora"), "--lora_rank", "4", "--lora_alpha", "8", "--merge"]) == 0
    run_stock(STOCK, str(place / "base"), str(place))
    return place


def opened(place: Path, out: Path, **settings) -> Workbench:
    settings = {**RUN, "prompts": str(place / "prompts.txt"), **settings}
    config = method_class("dmd2").Config(teacher=str(place / "base"), out=str(out), **settings)
    return open_workbench(config, "cpu")


def prepared(bench: Workbench, place: Path, **settings) -> dict[str, Role]:
    """The roles of a run with other settings, without recording its teacher anew."""
    settings = {**RUN, "prompts": str(place / "prompts.txt"), **settings}
    config = method_class("dmd2").Config(teacher=str(place / "base"), out=bench.config.out, **settings)
    return prepare(Workbench(config, bench.teacher, bench.device), "dmd2").roles


def test_both_experts_are_trained_and_shipped_with_their_boundary(trained: Path) -> None:
    base = DiffusionPipeline.from_pretrained(trained / "base")
    for folder in (trained / "full" / "student", trained / "lora" / "student"):
        student = DiffusionPipeline.from_pretrained(folder)
        assert type(student) is type(base) and student.config.boundary_ratio == 0.875
        for name in EXPERTS:
            ours, theirs = (getattr(pipeline, name).state_dict() for pipeline in (student, base))
            assert any(not torch.equal(ours[key], theirs[key]) for key in theirs), name
        about = json.loads((folder / "fewstep.json").read_text())
        assert about["experts"] == {
            "transformer": {"lowest_timestep": 875.0, "trained": True},
            "transformer_2": {"lowest_timestep": None, "trained": True},
        }
    _, tensors = load_latest(trained / "full" / "checkpoints")
    for role in ("student", "critic"):
        assert {key.split(".")[1] for key in tensors[role]} == set(EXPERTS)
    card = (trained / "full" / "student" / "README.md").read_text()
    assert "`transformer` from timestep 875 up, `transformer_2` below." in card


def test_stock_diffusers_samples_what_was_trained_at_every_count(trained: Path, tmp_path: Path) -> None:
    with numpy.load(trained / "seen.npz") as file:
        seen = dict(file)
    run = opened(trained, tmp_path)
    student = prepare(run, "dmd2").roles["student"]
    student.load_state_dict(load_latest(trained / "full" / "checkpoints")[1]["student"])
    assert set(run.student.plan.counts) >= {1, 2, 4}
    for count in run.student.plan.counts:
        grid = run.student.plan.grids[count]
        wanted = [EXPERTS[t < 0.875] for t in grid]
        sampler = type(run.sampler)(run.sampler.schedule, grid, "ode")
        noise = torch.randn(1, *run.recording.sample_shape, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            ours = rollout(student, sampler, noise, run.recording.condition(prompts=["a cat"])).numpy()
        assert numpy.abs(seen[f"full {count}"] - ours).max() < 1e-4 * numpy.abs(ours).max()
        for form in ("full", "lora", "lora_by_pipeline", "merged"):
            assert seen[f"{form} {count} calls"].tolist() == wanted
        merged = seen[f"merged {count}"]
        for form in ("lora", "lora_by_pipeline"):
            assert numpy.abs(seen[f"{form} {count}"] - merged).max() < 1e-4 * numpy.abs(merged).max()
        assert numpy.abs(seen[f"full {count}"] - merged).max() > 1e-3 * numpy.abs(merged).max()
    assert seen["full 1 calls"].tolist() == ["transformer"]  # a count that never meets the second is right too


def test_a_grid_that_meets_the_boundary_is_trained_as_it_is_walked(tmp_path: Path) -> None:
    """At 4 steps the second one is asked at t = 0.9, where the networks change; which one it is, rounding decides."""
    pipeline = tiny_wan(boundary_ratio=0.9)
    recording = record(pipeline, prompt="a cat", **WAN_CALL)
    plan = plan_student(recording, 4)
    assert plan.timesteps == (1000.0, 900.0, 750.0, 500.0)
    trained = recording.intervals.index(torch.tensor(plan.grid, dtype=torch.float64))
    assert trained.tolist() == [0, 0, 1, 1]
    assert [recording.expert_at(timestep).component for timestep in plan.timesteps] == [EXPERTS[k] for k in trained]
    student = with_parts(pipeline, scheduler=plan.scheduler)
    assert check_student(recording, student, plan.call, Move("ode"), 4).grid == plan.grid
    student.register_to_config(boundary_ratio=0.7)
    with pytest.raises(SchedulerCheckError, match=r"calls transformer at timestep 750, where transformer_2 is trained"):
        check_student(recording, student, plan.call, Move("ode"), 4)
    assert "no step calls transformer_2, which stays the teacher's" in plan_student(recording, 1).note


def test_the_teacher_is_guided_as_strongly_as_the_call_says_at_each_time(place: Path, tmp_path: Path) -> None:
    run = opened(place, tmp_path / "a", guidance_scale=4.0)
    guided = run.guided(run.make_roles("student")["teacher"])
    assert isinstance(guided, GuidedDenoiser) and isinstance(guided.guidance_scale, TimedScale)
    assert guided.guidance_scale.scales == (4.0, 3.0)
    assert guided.guidance_scale.intervals.lowest == (0.875, 0.0)
    one = opened(place, tmp_path / "b", guidance_scale=4.0, call=WAN_CALL)
    assert one.guidance_scale == 4.0  # where all have the same, it is a number


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({}, id="full", marks=pytest.mark.soak),
        pytest.param({**LORA, **HALF, "full_critic": True}, id="lora_in_half_precision"),
    ],
)
def test_interrupted_and_resumed_is_the_same_as_uninterrupted(place: Path, tmp_path: Path, form: dict) -> None:
    settings = {**RUN, **form, "prompts": str(place / "prompts.txt"), "ema_decay": 0.9, "checkpointing_steps": 2}
    settings |= {"max_steps": 4, "steps": 2, "batch_size": 1}
    whole = distill(place / "base", "dmd2", out=str(tmp_path / "whole"), **settings)
    distill(place / "base", "dmd2", out=str(tmp_path / "parts"), **{**settings, "max_steps": 2})
    parts = distill(place / "base", "dmd2", out=str(tmp_path / "parts"), **settings, resume=True)
    states = [load_latest(folder.parent / "checkpoints")[0]["files"] for folder in (whole, parts)]
    assert states[0] == states[1]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert len(files) == 4  # of a LoRA each network's, in diffusers' names and in Wan's own
    for path in files:
        one, two = load_file(whole / path), load_file(parts / path)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_student_of_one_step_has_one_expert(place: Path, tmp_path: Path) -> None:
    settings = {**RUN, **HALF, "prompts": str(place / "prompts.txt"), "steps": 1}
    folder = distill(place / "base", "dmd2", out=str(tmp_path / "run"), **settings)
    # At one step the second network of the student is never asked: it is the teacher's, and the folder says so.
    about = json.loads((folder / "fewstep.json").read_text())
    assert about["experts"]["transformer_2"]["trained"] is False
    assert "`transformer_2` below (the teacher's own: no step leads there)" in (folder / "README.md").read_text()
    _, tensors = load_latest(tmp_path / "run" / "checkpoints")
    names = {name.split("/")[0] for name in tensors["student_optimizer"]}
    assert names and all(".transformer." in name for name in names)


def test_one_head_judges_the_features_of_both(place: Path, tmp_path: Path) -> None:
    run = opened(place, tmp_path, **LORA)
    critic = run.make_roles("student", "critic")["critic"]
    tap = run.add_head(critic)
    x = torch.randn(2, *run.recording.sample_shape)
    t = torch.tensor([0.95, 0.3], dtype=torch.float64)
    features = critic.denoiser.features(x, t, run.conditions.select([0, 1]), tap)
    assert critic.added["head"](features).shape == (2,)
    critic.added["head"](features).sum().backward()
    moved = {name.split(".")[1] for name, p in critic.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"transformer", "transformer_2"} <= moved


@pytest.mark.parametrize("form", [{}, LORA], ids=["full", "lora"])
def test_mixed_batches_cost_no_more_than_the_method_declares(place: Path, tmp_path: Path, form: dict) -> None:
    run = opened(place, tmp_path, **form)
    method = prepare(run, "dmd2")

    def batch() -> Batch:
        draws, shape = Draws(0, 1, range(2)), run.recording.sample_shape
        return Batch(2, shape, run.conditions.select([0, 1]), draws, None, False)

    with CallCounter(method) as counter:
        for turn in method.turns(1, batch()):
            tensors, gradients = zip(*turn.backward, strict=True)
            torch.autograd.backward(tensors, gradients, inputs=method.roles[turn.role].parameters())
    assert counter.calls(1) == declared(method, 1, batch())


def test_a_lora_is_applied_to_both_and_refused_where_it_does_not_belong(trained: Path) -> None:
    folder = trained / "lora" / "student_lora"
    pipeline = apply(DiffusionPipeline.from_pretrained(trained / "base"), folder)
    calls = []
    pipeline.transformer_2.register_forward_hook(lambda *_: calls.append(1))
    latents = pipeline("a cat", output_type="latent", generator=torch.Generator().manual_seed(5)).frames
    assert len(calls) == 2
    with numpy.load(trained / "seen.npz") as file:
        assert numpy.abs(latents.numpy() - file["lora 4"]).max() < 1e-5
    with pytest.raises(UserError, match=r"with boundary_ratio=0\.875, and this pipeline has boundary_ratio=0\.5"):
        apply(tiny_wan(boundary_ratio=0.5), folder)
    single = tiny_wan()
    single.register_modules(transformer_2=None)
    with pytest.raises(UserError, match="is for the transformer_2 of base, and WanPipeline has none"):
        apply(single, folder)


def test_a_second_stage_takes_over_both(trained: Path, tmp_path: Path) -> None:
    whole, run = trained / "full" / "student", opened(trained, tmp_path)
    _, tensors = load_latest(trained / "full" / "checkpoints")
    for init in (trained / "full", whole):
        state = prepared(run, trained, init=str(init))["student"].state_dict()
        assert all(torch.equal(value, tensors["student"][key]) for key, value in state.items())
    _, tensors = load_latest(trained / "lora" / "checkpoints")
    state = prepared(run, trained, init=str(trained / "lora"), **LORA)["critic"].state_dict()
    assert all(torch.equal(value, tensors["critic"][key]) for key, value in state.items())
    for settings, words in (
        ({**LORA, "lora_alpha": 4.0, "init": str(trained / "lora")}, "was trained with --lora_alpha 8"),
        ({**LORA, "init": str(whole)}, "is a whole network"),
        ({**LORA, "init": str(trained / "full")}, "holds a network for the student"),
    ):
        with pytest.raises(UserError, match=words):
            prepared(run, trained, **settings)
