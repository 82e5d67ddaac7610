"""Every recipe is at its floor, the floors are those of the papers' tables, and what is above one is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.cli import main
from fewstep.data.batch import Batch
from fewstep.eval.bench import calls
from fewstep.eval.bench.calls import Recipe
from fewstep.programs.methods import method_class

RECIPES = {recipe.name: recipe for recipe in calls.recipes()}


@pytest.fixture(scope="module")
def recording():
    return calls.recording_of("fashion-sd")


def test_every_method_and_variant_has_a_row() -> None:
    assert {recipe.method for recipe in RECIPES.values()} == set(calls.methods())
    for name in ("swiftbrush", "f-distill", "alpha_flow", "ect", "ict", "cd", "mean_flow-data", "sid-lsg"):
        assert any(row.startswith(f"{name},") for row in RECIPES)


@pytest.mark.parametrize(
    ("name", "changes", "forward_passes"),
    [
        ("sid_sd15", {}, 18),
        ("consistency_ict_cifar10", {}, 4),
        ("rectified_flow_sd15", {}, 3),
        ("mean_flow_imagenet", {"kappa": 0.0, "omega": 2.5}, 4.25),
    ],
)
def test_a_floor_is_that_of_the_papers_table(name: str, changes: dict, forward_passes: float, recording) -> None:
    """SiD-LSG 18 F, iCT 4 F, rectified flow 3 F, MeanFlow from data with guidance 4.25 F at a quarter apart."""
    recipe = RECIPES[name]
    found, same = calls.count(replace(recipe, config=replace(recipe.config, **changes)), recording)
    assert same and list(found.faults(same)) == []
    assert found.paper == pytest.approx(forward_passes)
    assert found.calls - found.drawn == pytest.approx(forward_passes)


@pytest.mark.soak
def test_dmd2_with_a_gan_costs_what_its_paper_costs(recording) -> None:
    """r (4 + 6h) + 5 + 2h, and the student's earlier steps."""
    found, same = calls.count(RECIPES["dmd2_sdxl"], recording)
    assert same and list(found.faults(same)) == []
    share = (found.paper - 25) / 32
    assert 0.3 < share < 0.7 and found.calls - found.drawn == pytest.approx(5 * (4 + 6 * share) + 5 + 2 * share)


@pytest.mark.parametrize(("reason", "code"), [(None, 1), ("it is a test", 0)])
def test_a_method_above_its_floor_ends_with_code_1(
    reason: str | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A step that asks the frozen teacher once more than it must."""
    method = method_class("rectified_flow")
    turns = method.turns

    def wasteful(self, step: int, batch: Batch):
        with torch.no_grad():
            x0: Tensor = batch.pairs.x0
            self.roles["teacher"](x0, torch.full((batch.size,), 0.5, dtype=torch.float64), batch.pairs.conditioning)
        yield from turns(self, step, batch)

    monkeypatch.setattr(method, "turns", wasteful)
    chosen: list[Recipe] = [RECIPES["rectified_flow_sd15"]]
    monkeypatch.setattr(calls, "recipes", lambda: chosen)
    monkeypatch.setattr(calls, "REASONS", {"rectified_flow_sd15": reason} if reason else {})
    assert main(["bench", "--part", "calls", "--cpu", "--out", str(tmp_path)]) == code
    out = capsys.readouterr().out
    assert ("rectified_flow_sd15: its calls cost 4.00 F and not as declared, 3.00 F" in out) == (reason is None)
    assert ("above: it is a test" in out) == (reason is not None)


@pytest.mark.soak
def test_every_recipe_is_at_its_floor() -> None:
    assert calls.measure().failures == []
