"""A run's settings of how its networks are computed reach them, and what came of it is said before training."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny_pipelines
import torch

from fewstep.networks.compile_trial import compile_roles
from fewstep.programs import faster
from fewstep.programs.distillation import distill, prepare
from fewstep.programs.methods import method_class
from fewstep.programs.workbench import open_workbench


def test_a_run_without_a_compiler_says_so_in_one_line_and_runs(tmp_path: Path, monkeypatch) -> None:
    """The trial has the batch of the training, whose graph it makes."""
    batches: list[set[int]] = []

    def missing(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> None:
        batches.append({tensor.shape[0] for tensor in given if isinstance(tensor, torch.Tensor) and tensor.dim() == 4})
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(faster, "compile_roles", partial(compile_roles, backend=missing))
    said: list[str] = []
    settings = {"batch_size": 3, "steps": 1, "report_to": "none", "cpu": True, "compile": True}
    config = method_class("rectified_flow").Config(teacher="tiny", out=str(tmp_path), **settings)
    bench = open_workbench(config, "cpu", tiny_pipelines.tiny_ddim(), said.append)
    torch._dynamo.reset()
    prepared = prepare(bench, "rectified_flow")
    lines = [line for line in said if "--compile" in line]
    assert len(lines) == 1 and lines[0].startswith("--compile: nothing is compiled: ") and "\n" not in lines[0]
    assert "no C++ compiler was found" in lines[0]
    assert len(batches) == 1 and 3 in batches[0]
    x, t, conditioning = bench.two_samples()
    assert prepared.roles["student"].denoiser(x, t, conditioning).shape == x.shape


@pytest.mark.soak
def test_a_compiled_run_trains_as_one_that_is_not(tmp_path: Path) -> None:
    def losses(compiled: bool) -> list[float]:
        out = tmp_path / str(compiled)
        settings = {"steps": 1, "max_steps": 3, "log_steps": 1, "sample_steps": 0, "report_to": "none", "cpu": True}
        distill(tiny_pipelines.tiny_ddim(), "dmd2", out=str(out), compile=compiled, lr=1e-3, **settings)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [value for row in rows for name, value in sorted(row.items()) if "loss" in name]

    found, expected = losses(True), losses(False)
    assert expected and found == pytest.approx(expected, rel=1e-3)
