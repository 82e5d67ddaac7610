"""Steps in another order give the same gradients, and one that does not is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_stable_diffusion

from fewstep.eval.bench import peers
from fewstep.eval.memory.shapes import SHAPES, Shape


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(lambda world: tiny_stable_diffusion(), batch_size=6))


def faults(tmp_path: Path, pairs: list[peers.Pair]) -> list[str]:
    table = peers.measure(torch.device("cpu"), tmp_path, blocks=1, shape="tiny", pairs=pairs)
    assert [row["name"] for row in table.numbers] == [pair.name for pair in pairs]
    assert all(row["gain"]["median"] > 0 for row in table.numbers)
    return table.failures


def test_every_order_of_dmd2_has_the_same_gradients(tmp_path: Path) -> None:
    known = [pair for pair in peers.PAIRS if pair.case.method == "dmd2"]
    wrong = replace(known[0], name="wrong", theirs=lambda run, step: [2 * g for g in peers.ours(run, step)])
    (failure,) = faults(tmp_path, [*known, wrong])
    assert len(known) == 2 and failure.startswith("wrong: gradients differ by 5.0e-01")


@pytest.mark.soak
def test_every_order_of_mean_flow_has_the_same_gradients(tmp_path: Path) -> None:
    known = [pair for pair in peers.PAIRS if pair.case.method != "dmd2"]
    assert len(known) == 2 and faults(tmp_path, known) == []
