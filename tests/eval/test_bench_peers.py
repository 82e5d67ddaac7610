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


def test_both_orders_have_the_same_gradients(tmp_path: Path) -> None:
    wrong = replace(peers.PAIRS[1], name="wrong", theirs=lambda run, step: [2 * g for g in peers.ours(run, step)])
    table = peers.measure(torch.device("cpu"), tmp_path, blocks=1, shape="tiny", pairs=[*peers.PAIRS, wrong])
    assert [row["name"] for row in table.numbers] == [*(pair.name for pair in peers.PAIRS), "wrong"]
    (failure,) = table.failures
    assert failure.startswith("wrong: gradients differ by 5.0e-01")
    assert all(row["difference"] < peers.EQUAL and row["gain"]["median"] > 0 for row in table.numbers[:-1])
