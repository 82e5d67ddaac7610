"""The demo's steps by part: all of a step is somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.eval.bench import demo


@pytest.mark.soak
def test_the_parts_add_up_to_the_step(tmp_path: Path) -> None:
    table = demo.measure(torch.device("cpu"), tmp_path, cycles=1)
    taken = {row["part"]: row["milliseconds"]["median"] for row in table.numbers}
    assert set(taken) == {"step", *demo.PARTS} and min(taken.values()) > 0
    assert sum(taken[name] for name in demo.PARTS) == pytest.approx(taken["step"])
    assert taken["the rest"] < 0.5 * taken["step"]
