"""Plans: made without weights, and equal to what the same step takes on real tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import tiny_pipelines
import torch
from torch import nn

import fewstep
from fewstep.cli import main
from fewstep.cli.plan import memory_bytes
from fewstep.conditioning.conditioning import Conditioning
from fewstep.errors import UserError
from fewstep.programs.methods import method_class, methods
from fewstep.programs.planning import counting
from fewstep.programs.planning.counting import PERIOD, mean_calls
from fewstep.programs.planning.drawn import answering
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.moments import weigh
from fewstep.programs.planning.plan import Planner
from fewstep.programs.planning.weightless import fake_tensors, weightless_teacher
from fewstep.recording import record


@pytest.fixture(scope="module", autouse=True)
def short_period() -> Iterator[None]:
    """Calls are counted over fewer steps than those of a plan, a fifth of its time; one test below counts them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "PERIOD", 20)
        patch.setattr(counting, "_SEARCHED", 5)
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, str, dict]]:
    """Makes a pipeline, a folder of its configuration files without any weights, and how it is called."""

    @cache
    def make(family: str) -> tuple[Any, str, dict]:
        build, call = tiny_pipelines.TINY[family]
        pipeline, folder = build(), tmp_path_factory.mktemp(family) / "teacher"
        pipeline.save_pretrained(folder)
        for path in folder.rglob("*.safetensors"):
            path.unlink()
        return pipeline, str(folder), call

    return make


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("flow", "edm") else pytest.mark.soak) for name in tiny_pipelines.TINY],
)
def test_a_weightless_teacher_is_recorded_as_the_real_one(family: str, teachers: Callable) -> None:
    pipeline, folder, call = teachers(family)
    mode = fake_tensors()
    weightless = weightless_teacher(folder, mode)
    with answering(weightless, mode):
        found = record(weightless, **call)
    expected = record(pipeline, **call)
    assert (found.component, found.prediction_type) == (expected.component, expected.prediction_type)
    assert found.recipe == expected.recipe
    assert found.guidance == expected.guidance
    assert Conditioning(found.marked, 1).describe() == Conditioning(expected.marked, 1).describe()
    assert all("forward" not in vars(m) for m in weightless.components.values() if isinstance(m, nn.Module))


CASES = {
    "ddim": {"ema_decay": 0.9},
    "dit": {"lora_rank": 2, "ema_decay": 0.9},
    "stable_diffusion": {"gan_weight": 0.1, "data": "images"},
    "flow": {"mixed_precision": "bf16", "gradient_checkpointing": True},
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(
    ("family", "settings"),
    [pytest.param(*case, id=case[0], marks=() if case[0] == "flow" else pytest.mark.soak) for case in CASES.items()],
)
def test_a_step_on_fake_tensors_takes_what_it_takes_on_real_ones(
    family: str, settings: dict, teachers: Callable
) -> None:
    pipeline, folder, call = teachers(family)
    config = method_class("dmd2").Config(teacher=folder, out="", call=call, batch_size=2, **settings)
    planned = Planner(config, "dmd2").plan()
    dry_run = DryRun(config, "dmd2", record(pipeline, **call))
    method = dry_run.prepare()
    with torch.backends.mkldnn.flags(enabled=False):
        real = weigh(method, dry_run, 0)
    assert planned.moments.keys() == real.keys() == {"student", "critic"}
    for name, moment in real.items():
        assert planned.moments[name].graph == pytest.approx(moment.graph, rel=0.1)
        assert planned.moments[name].peak == pytest.approx(moment.peak, rel=0.1)
    for name, role in method.roles.items():
        assert planned.roles[name].gradients == sum(p.nbytes for p in role.parameters())
    assert planned.calls == mean_calls(config, "dmd2", dry_run.recording)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "zoo_name" in metafunc.fixturenames:
        metafunc.parametrize("zoo_name", pipeline_folder.names(metafunc.config, sample=True))


def test_any_pipeline_is_planned_without_its_weights(zoo_name: str, zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / zoo_name
    shutil.copytree(zoo / zoo_name, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    call = pipeline_folder.call_of(zoo, zoo_name, weightless_teacher(str(folder), fake_tensors()))
    plan = fewstep.plan(str(folder), call=call, batch_size=1, lora_rank=2, steps=1)
    assert plan.peak > plan.held > 0
    assert plan.calls["teacher"].no_grad > 0


#: The plainest, and those of stages and of several students. That every step runs on fake tensors test_waits.py sees.
SHORT = ("dmd2", "hyper_sd", "multi_student", "rectified_flow")


@pytest.mark.parametrize("name", [pytest.param(m, marks=() if m in SHORT else pytest.mark.soak) for m in methods()])
def test_every_method_can_be_planned(name: str, teachers: Callable) -> None:
    _, folder, _ = teachers("stable_diffusion" if name == "speed_up_net" else "dit")  # which has no text
    data = "images" if name in ("consistency", "flash_dmd", "mean_flow") else None
    plan = fewstep.plan(folder, name, lora_rank=2, batch_size=1, data=data)
    assert plan.roles["student"].gradients > 0
    assert plan.peak > plan.held >= plan.kept
    assert "student" in plan.moments


@pytest.mark.soak
def test_a_network_that_would_be_told_its_guidance_is_planned_without_the_new_input(teachers: Callable) -> None:
    _, folder, _ = teachers("stable_diffusion")
    settings = {"batch_size": 1, "guidance_min": 2.0, "guidance_max": 4.0}
    drawn = fewstep.plan(folder, "consistency", **settings)
    told = fewstep.plan(folder, "consistency", guidance_embedding=True, **settings)
    assert (told.calls, told.peak) == (drawn.calls, drawn.peak)


def test_the_numbers_of_a_plan_are_those_of_its_parts(teachers: Callable) -> None:
    _, folder, _ = teachers("dit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "PERIOD", PERIOD)
        planner = Planner(method_class("dmd2").Config(teacher=folder, out="", batch_size=1), "dmd2")
        full = planner.plan(ema_decay=0.9)
    network = full.parameters["transformer"] * 4
    assert full.roles["teacher"].weights == full.roles["ema"].weights == pytest.approx(network, rel=0.1)
    assert (full.roles["student"].gradients, full.roles["student"].optimizer) == (network, 2 * network)
    assert full.roles["ema"].optimizer == 0
    assert full.held == full.kept + sum(role.weights for role in full.roles.values()) + 2 * 2 * network
    lora = planner.plan(lora_rank=1)
    assert lora.roles["teacher"].weights < network / 5  # the weights are the pipeline's own: adapters only
    assert lora.roles["student"].gradients < network / 5
    checkpointed = planner.plan(batch_size=8, gradient_checkpointing=True, mixed_precision="bf16")
    assert checkpointed.roles["teacher"].weights == pytest.approx(network / 2, rel=0.1)
    assert checkpointed.moments["critic"].graph < 0.8 * planner.plan(batch_size=8).moments["critic"].graph
    accumulated = planner.plan(ema_decay=0.9, gradient_accumulation_steps=8)
    more = accumulated.moments["critic"].peak - full.moments["critic"].peak
    assert 0.2 * network < more <= network  # the first micro-batch's gradients beside the second's graph
    assert full.calls["critic"].to_parameters == pytest.approx(1)
    assert full.calls["student"].no_grad + full.calls["student"].to_parameters == pytest.approx(2.5, abs=0.1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_each_number_with_how_it_came_about(
    teachers: Callable, capsys: pytest.CaptureFixture
) -> None:
    _, folder, _ = teachers("ddim")
    words = ["plan", folder, "dmd2", "--lora_rank", "2", "--batch_size", "1", "--attention_backend", "flash"]
    assert main([*words, "--memory", "24GB", "--eval_steps", "300"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "attention      flash, tried when the run begins: 4 AttnProcessor2_0 (through SDPA)" in rows
    for name in ("parameters", "recording", "weights", "gradients", "optimizer", "network calls"):
        assert any(row.startswith(name) and "computed: " in row for row in rows), name
    for name in ("activations", "peak"):
        assert any(row.startswith(name) and "estimated: " in row for row in rows), name
    evaluated = "evaluations    computed: 5 of 256 samples: student 5,120 calls, teacher 6,400 before them; "
    assert any(row.startswith(evaluated) for row in rows)
    assert any(row.startswith("not counted") and "fragmentation" in row for row in rows)
    assert rows[-1].startswith("fits           yes: ")


@pytest.mark.soak
def test_a_changed_setting_is_planned_as_a_run_that_is_told_it(teachers: Callable) -> None:
    """A consistency LoRA needs no slow copy, whatever the full run would have had."""
    _, folder, _ = teachers("dit")
    full = Planner(method_class("consistency").Config(teacher=folder, out="", batch_size=1), "consistency")
    assert full.plan().roles.keys() == {"teacher", "student", "target"}
    assert full.plan(lora_rank=2) == fewstep.plan(folder, "consistency", batch_size=1, lora_rank=2)
    assert full.plan(lora_rank=2).roles.keys() == {"teacher", "student"}


def test_what_does_not_fit_comes_with_advice(
    teachers: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "PERIOD", 4)  # how often it calls which network is no matter here
    monkeypatch.setattr(counting, "_SEARCHED", 2)
    _, folder, _ = teachers("dit")
    planner = Planner(method_class("dmd2").Config(teacher=folder, out="", batch_size=64, steps=1), "dmd2")
    many, one = planner.plan(), planner.plan(batch_size=1)
    words = ["plan", folder, "--batch_size", "64", "--steps", "1"]
    assert main([*words, "--memory", f"{(many.peak + one.peak) / 2e6}MB"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("fits           no: ")
    assert "; it would fit with --" in last


@pytest.mark.soak
def test_advice_may_not_be_enough_and_guidance_in_turn_takes_less(teachers: Callable) -> None:
    _, folder, _ = teachers("dit")
    planner = Planner(method_class("dmd2").Config(teacher=folder, out="", batch_size=64, steps=1), "dmd2")
    many = planner.plan()
    assert planner.advice(many, 10_000).startswith("even with --")
    assert planner.plan(sequential_guidance=True).peak < 0.95 * many.peak  # the teacher is asked beside the graph


@pytest.mark.soak
def test_plans_that_make_the_same_calls_are_counted_once(teachers: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes as long as weighing, and advice makes five plans."""
    _, folder, _ = teachers("dit")
    counted = []

    def noted(config: Any, *rest: Any) -> Any:
        counted.append(config)
        return mean_calls(config, *rest)

    monkeypatch.setattr("fewstep.programs.planning.plan.mean_calls", noted)
    planner = Planner(method_class("dmd2").Config(teacher=folder, out="", batch_size=1, lora_rank=2), "dmd2")
    first = planner.plan()
    assert planner.plan(mixed_precision="bf16", gradient_checkpointing=True, lora_rank=4).calls == first.calls
    assert len(counted) == 1
    rarer = planner.plan(critic_updates=10)
    assert rarer.calls["student"].to_parameters == pytest.approx(first.calls["student"].to_parameters / 2)
    assert len(counted) == 2


def test_sizes_of_memory() -> None:
    assert [memory_bytes(text) for text in ("24GB", "24", "0.5 GiB", "80mb")] == [24e9, 24e9, 2**29, 80e6]
    for text in ("", "GB", "24TBs", "-1GB", "0GB", "1KB"):
        with pytest.raises(UserError, match="--memory takes a size"):
            memory_bytes(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["fashion-sd", "nothing"], "there is no method 'nothing'"),
        (["dit", "--lora_rank", "4096"], "--lora_rank 4096 is larger than a layer"),
        (["fashion-sd", "--memory", "much"], "--memory takes a size"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, teachers: Callable, capsys: pytest.CaptureFixture
) -> None:
    words = [teachers(word)[1] if word == "dit" else word for word in words]
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_a_folder_that_lacks_a_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_pipelines.tiny_ddim().save_pretrained(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "unet")
    assert main(["plan", str(tmp_path / "teacher")]) == 2
    assert "cannot be built from its configuration files" in capsys.readouterr().err
    index = tmp_path / "teacher" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "DDIMPipeline", "unet": ["nowhere", "Nothing"]}))
    assert main(["plan", str(tmp_path / "teacher")]) == 2
    assert "nowhere" in capsys.readouterr().err
