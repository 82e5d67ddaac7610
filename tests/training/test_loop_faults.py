"""A run that dies, loses power or finds the disk full at any operation goes on, and ends as if nothing had been."""

from pathlib import Path

import pytest
import torch
from toys import TinyMethod, make_loop

from fewstep.training import checkpoint
from tests.faults import Faults, every_fault
from tests.training.loop_runs import config, rows, weights


def train(out: Path) -> torch.Tensor:
    method = TinyMethod()
    settings = {"max_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    loop = make_loop(method, config(out, **settings))
    if checkpoint.steps_in(loop.checkpoints):
        loop.resume()
    loop.run()
    return weights(method.roles["student"])


def log(out: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(out)]


def names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


@pytest.mark.parametrize(
    "kind", [pytest.param("death", marks=pytest.mark.soak), "power", pytest.param("full", marks=pytest.mark.soak)]
)
def test_a_run_goes_on_from_a_fault_at_any_of_its_operations(tmp_path: Path, kind: str):
    expected = train(tmp_path / "whole")

    def check(out: Path, fault: Faults) -> None:
        named = [line.rsplit("_", 1)[1] for line in fault.done if line.startswith("rename /checkpoints/.partial")]
        if checkpoint.steps_in(out / "checkpoints"):
            found = checkpoint.find_latest(out / "checkpoints")
            assert (found.state["step"], found.note) == (int(named[-1]), ""), fault.happened
        else:
            assert not named, fault.happened
        assert torch.equal(train(out), expected), fault.happened
        assert log(out) == log(tmp_path / "whole"), fault.happened
        assert names(out) == names(tmp_path / "whole"), fault.happened

    every_fault(kind, train, check, at_least=30)
