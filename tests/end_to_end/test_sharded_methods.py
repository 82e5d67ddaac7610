"""Every method divided over two processes, through to its files: a whole run's student, or one line before training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.programs import distillation
from tests.end_to_end.method_cases import CASES, LORA, RUN
from tests.end_to_end.test_shared_steps import assert_same_weights
from tests.forked import well

#: Cases of other teachers, and those that go on from another run.
ELSEWHERE = ("speed_up_net", "snoopi", "dmd2, items", "rectified flow, items")
#: Why a case cannot be divided.
REFUSED = dict.fromkeys(
    ("mean flow", "mf_rae", "mft", "any_flow", "any_flow, data", "twin_flow"), "would not make the same network calls"
)
DIVIDED = [case for case in CASES if case not in (*ELSEWHERE, *REFUSED)]


def settings_of(case: str, place: Path) -> tuple[str, dict[str, Any]]:
    method, settings = CASES[case]
    data = {"data": str(place / "images")} if "data" in settings else {}
    return method, {**RUN, "lr": 1e-3, "batch_size": 2, **settings, **data}


def files_of(folder: Path) -> dict[str, Tensor]:
    """The weights of a run's student, as they were written."""
    found: dict[str, Tensor] = {}
    for path in sorted((folder / "student").rglob("*.safetensors")):
        found |= {f"student/{path.parent.name}.{name}": value for name, value in load_file(path).items()}
    assert found
    return found


@pytest.mark.soak
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", DIVIDED)
def test_a_divided_run_writes_the_student_of_a_whole_one(case: str, lora: bool, teacher: Any, place: Path) -> None:
    method, settings = settings_of(case, place)
    if lora and "student_network" in settings:
        pytest.skip("a smaller student is trained whole")
    written = {}
    for sharding in ("none", "full"):
        out = place / f"{case} {lora} {sharding}"
        told = {**settings, **(LORA if lora else {}), "out": str(out), "sharding": sharding}
        well(2, lambda _rank, told=told: partial(distillation.distill, teacher, method, **told)(), Path(f"{out}_said"))
        written[sharding] = files_of(out)
    assert_same_weights(written["none"], written["full"])


@pytest.mark.soak
@pytest.mark.parametrize(("case", "why"), REFUSED.items())
def test_what_cannot_be_divided_says_so_before_training(case: str, why: str, teacher: Any, place: Path) -> None:
    method, settings = settings_of(case, place)
    with pytest.raises(UserError, match=why) as caught:
        distillation.distill(teacher, method, out=str(place / f"{case} refused"), sharding="full", **settings)
    assert "\n" not in str(caught.value)
    assert not (place / f"{case} refused" / "metrics.jsonl").exists()
