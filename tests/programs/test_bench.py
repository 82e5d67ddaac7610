"""Every method is prepared at the bench of a run and at that of a dry run, and asks for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_ddim, tiny_stable_diffusion

import fewstep
from fewstep.config.run import RunConfig
from fewstep.programs.methods import method_class, methods
from fewstep.programs.planning import counting
from fewstep.programs.planning.dry_run import DryRun
from fewstep.programs.planning.stand_in import stand_in
from fewstep.programs.teacher import Teacher
from fewstep.programs.workbench import Workbench, open_workbench
from fewstep.recording import record
from fewstep.recording.watch.shake import shaken
from fewstep.training.method import Bench

ASKED = {name for name in vars(Bench) if not name.startswith("_")}
BASE = {"teacher": "tiny", "out": "unused", "batch_size": 2, "cpu": True, "ema_decay": 0.9, "report_to": "none"}


class OnlyBench:
    """A bench of which only the protocol can be seen."""

    def __init__(self, bench: Any) -> None:
        self._bench = bench

    def __getattr__(self, name: str) -> Any:
        if name not in ASKED:
            raise AssertionError(f"a method asked its bench for {name}, which the protocol does not have")
        return getattr(self._bench, name)


def test_a_dry_run_moves_as_the_run_would() -> None:
    """What follows from the settings given is what it plays, and global random numbers stay where they were."""
    config = method_class("consistency").Config(**BASE)
    before = torch.random.get_rng_state()
    assert DryRun(config, "consistency", stand_in(record(tiny_ddim()))).sampler.renoise == "fresh"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_lpips_is_left_out_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weightless pipeline has no decoder to ask."""
    monkeypatch.setattr(counting, "PERIOD", 2)
    monkeypatch.setattr(counting, "_SEARCHED", 1)
    plan = fewstep.plan("fashion-flow", "rectified_flow", perceptual_weight=1.0, batch_size=2)
    assert plan.calls["student"].to_parameters == 1


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Teacher, str]:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    pipeline = tiny_stable_diffusion()
    with shaken(pipeline.unet):
        bench = open_workbench(RunConfig(**BASE, prompts=str(prompts)), "cpu", pipeline)
    return bench.teacher, str(prompts)


#: What a method must be told to run on two prompts without images.
NEEDED: dict[str, dict[str, Any]] = {"flash_dmd": {"gan_weight": 0.0}, "multi_student": {"students": 2}}


@pytest.mark.parametrize(
    "settings", [pytest.param({}, id="copies", marks=pytest.mark.soak), pytest.param({"lora_rank": 2}, id="adapters")]
)
@pytest.mark.parametrize("name", methods())
def test_a_method_is_prepared_alike_at_both(name: str, settings: dict[str, Any], opened: tuple[Teacher, str]) -> None:
    teacher, prompts = opened
    config = method_class(name).Config(**BASE, **settings, **NEEDED.get(name, {}), prompts=prompts)
    benches = [Workbench(config, teacher, "cpu"), DryRun(config, name, teacher.recording)]
    roles = []
    for bench in benches:
        assert all(hasattr(bench, attribute) for attribute in ASKED)
        method = method_class(name).prepare(config, OnlyBench(bench))
        roles.append({role.name: sorted(role.modules) for role in method.roles.values()})
        assert all((method.learning_rate(role.name) > 0) for role in method.roles.values() if role.parameters())
    assert roles[0] == roles[1] and {"student", "teacher", "ema"} <= roles[0].keys()
