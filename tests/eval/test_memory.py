"""Memory: LoRA roles against full copies, and plans against what is measured."""

from __future__ import annotations

import pytest
import tiny_pipelines
import torch

from fewstep.errors import UserError
from fewstep.eval.memory import __main__ as memory
from fewstep.eval.memory.__main__ import COMPARED, SDXL, SIDES, compare_plans, compare_roles, estimate, measure, run
from fewstep.eval.memory.shapes import SHAPES, Shape, unet
from fewstep.programs.planning.weightless import fake_tensors, fake_world

AT_MOST = 0.35  # what LoRA roles may take of what full copies take
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_compared_network_has_a_hundred_million_parameters() -> None:
    mode = fake_tensors()
    network = unet(lambda: fake_world(mode)).unet
    assert sum(parameter.numel() for parameter in network.parameters()) > 100e6


@pytest.mark.soak
def test_lora_roles_are_planned_to_take_a_third_of_what_full_copies_take() -> None:
    planned = {side: estimate("dit", **settings) for side, settings in SIDES.items()}
    assert planned["lora"] <= AT_MOST * planned["full"]


def test_a_measured_run_trains_and_is_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(lambda world: tiny_pipelines.tiny_dit()))
    steps: list[str] = []
    update = memory.RoleOptimizer.update
    monkeypatch.setattr(
        memory.RoleOptimizer, "update", lambda self, step: (steps.append(self.role.name), update(self, step))
    )
    assert run("tiny", {"lora_rank": 2, "ema_decay": 0.5}) >= 0
    assert steps == ["student", "critic"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "roles | plans"), (["nothing"], "roles | plans"), (["plans", "none"], "no shape 'none'")],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert memory.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_without_a_gpu_or_linux_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="on a GPU, or on the CPU of a Linux"):
        measure("unet")
    assert memory.main(["sdxl"]) == 2
    assert "there is none" in capsys.readouterr().err


@pytest.mark.soak
def test_lora_roles_take_a_third_of_what_full_copies_take() -> None:
    assert compare_roles() <= AT_MOST


@pytest.mark.soak
def test_a_plan_is_what_a_run_takes() -> None:
    ratios = compare_plans()
    assert len(ratios) == len(COMPARED) * len(SIDES)
    assert all(0.85 < ratio < 1.1 for ratio in ratios.values()), ratios


@pytest.mark.gpu
@gpu
def test_an_sdxl_shaped_lora_run_fits_24_gb() -> None:
    assert measure("sdxl", **SDXL) < 24e9


@pytest.mark.gpu
@gpu
def test_on_a_gpu_a_plan_is_what_a_run_takes() -> None:
    for shape in COMPARED:
        settings = {"lora_rank": 16, "mixed_precision": "bf16", "gradient_checkpointing": True}
        assert 0.7 < estimate(shape, **settings) / measure(shape, **settings) < 1.2
