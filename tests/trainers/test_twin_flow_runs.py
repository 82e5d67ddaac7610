"""TwinFlow's runs: copies and adapters, with and without samples, and students that sample without this package."""

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import WAN_CALL, dense_wan, tiny_flow, tiny_stable_diffusion

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.programs.distillation import prepare
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording.watch.shake import shaken
from fewstep.trainers.twin_flow import TwinFlow, TwinFlowConfig
from tests.stock_process import sample_stock
from tests.whole_runs import whole_run

RUN = {"steps": 4, "max_steps": 2, "batch_size": 4, "num_pairs": 4, "pair_steps": 2, "lr": 1e-2}
RUN |= {"sample_steps": 0, "report_to": "none", "cpu": True, "log_steps": 1}
FLOW_CALL = {"height": 16, "width": 16, "max_sequence_length": 8}
FAMILIES: dict[str, tuple] = {
    "flow adapters": (tiny_flow, "transformer", {"call": FLOW_CALL, "lora_rank": 2, "image_free": True}),
    "table": (tiny_stable_diffusion, "unet", {"ema_decay": 0.5, "target_decay": 0.9}),
    "video": (dense_wan, "transformer", {"call": WAN_CALL}),
}


def settings_of(place: Path, name: str) -> TwinFlowConfig:
    (place / "prompts.txt").write_text("a cat\na dog\n")
    told = {"prompts": str(place / "prompts.txt"), "teacher": name, "out": str(place / name)}
    return TwinFlowConfig(**{**RUN, **told, **FAMILIES[name][2]})


def test_students_sample_without_this_package_as_they_were_trained(tmp_path: Path):
    """At every count: by the file in their folder; Wan's as diffusers' own pipeline of two times."""
    folders, expected = [], []
    for name, (builder, network, _) in FAMILIES.items():
        pipeline = builder()
        with shaken(pipeline.components[network]):
            run = whole_run(settings_of(tmp_path, name), "twin_flow", pipeline)
        about, bench = json.loads((run.folder / "fewstep.json").read_text()), run.bench
        assert {1, 2, 4} <= set(about["counts"]) and about["trained_at_every_count"]
        assert about.get("code") == (None if name == "video" else "flow_map.py")
        shape = bench.recording.sample_shape
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))
        for count in about["counts"]:
            walk = Sampler(bench.sampler.schedule, bench.student.plan.grids[count], "ode", bench.sampler.initial_scale)
            with torch.no_grad():
                found = rollout(run.role, walk, noise, bench.conditions.select([0]))
            expected.append((name, len(folders), count, found))
        folders.append(run.folder)
    sampled = sample_stock(tmp_path / "sampled.npz", *folders)
    for name, place, count, found in expected:
        stock = sampled[place].latents[count]
        stock = stock.transpose(1, 2) if name == "video" else stock
        torch.testing.assert_close(stock, found, rtol=1e-3, atol=2e-3 * float(found.abs().max()))


def prepared(name: str, place: Path) -> tuple[TwinFlow, Workbench]:
    """The method of a run, untrained, of weights that say something."""
    builder, network, _ = FAMILIES[name]
    pipeline = builder()
    with shaken(pipeline.components[network]):
        bench = open_workbench(settings_of(place, name), "cpu", pipeline)
        method = prepare(bench, "twin_flow")
    assert isinstance(method, TwinFlow)
    return method, bench


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sides_start_as_the_teacher(name: str, tmp_path: Path):
    method, bench = prepared(name, tmp_path)
    y, _, told = bench.two_samples()
    t = method.student.known(torch.tensor([0.3, 0.7], dtype=torch.float64))
    x_t, own = method.student.own(y, t)
    with torch.no_grad():
        teacher = method.roles["teacher"].single.denoiser.velocity(x_t, own, told)
        for sign in (1, -1):
            found = method.student(y, sign * t, sign * t, told)
            torch.testing.assert_close(found, teacher, rtol=1e-4, atol=1e-4 * float(teacher.abs().max()))


def test_a_step_needs_no_samples_and_the_second_time_learns_from_it(tmp_path: Path):
    method, bench = prepared("flow adapters", tmp_path)
    assert bench.config.pairs_wanted is None
    (turn,) = method.turns(0, bench.batches(None).micro_batch(0, 0, range(4), 4, False))
    loss, _ = turn.backward[0]
    loss.backward()
    heads = [p.grad for n, p in method.roles["student"].added["second_time"].named_parameters() if "heads" in n]
    assert heads and all(gradient is not None and bool(gradient.any()) for gradient in heads)
    assert all(p.grad is None for p in method.roles["teacher"].weights.parameters())
