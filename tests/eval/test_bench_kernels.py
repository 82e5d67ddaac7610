"""Every operation has a row for each of its forms, and one that is wrong is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.eval.bench import kernels
from fewstep.kernels import dispatch, renoise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", {"adamw": (3, 4, 5), "dual_attention": (1, 2, 5, 4)})
    monkeypatch.setattr(kernels, "LATENTS", (2, 3, 4, 4))
    monkeypatch.setattr(kernels, "_CALLS", 1)


def test_every_operation_has_a_row_for_each_form() -> None:
    table = kernels.measure(CPU, blocks=1)
    assert table.failures == []
    rows = {(row["operation"], row["form"]): row for row in table.numbers}
    assert (
        {name for name, _ in rows} == set(kernels.operations()) >= {"adamw", "dual_attention", "renoise", "score_gap"}
    )
    for (name, form), row in rows.items():
        assert form in dispatch.FORMS and row["bytes"] > 0 and row["seconds"]["median"] > 0
        assert row["runs_here"] == (form == dispatch.WON.get(name, {}).get("cpu", "closed"))


def test_least_bytes_are_those_of_all_that_goes_in_and_out() -> None:
    """Noising: x0, noise, two coefficients of float64 in; x_t and the gradient at x0 out."""
    entries = 2 * 3 * 4 * 4
    assert kernels.Work(renoise, "closed", (2, 3, 4, 4), CPU).bytes == 4 * 4 * entries + 2 * 8 * 2


def test_a_wrong_form_ends_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = renoise.closed
    monkeypatch.setattr(renoise, "closed", lambda x0, noise, alpha, sigma: right(x0, noise, alpha, sigma) * 1.001)
    monkeypatch.setattr(kernels, "operations", lambda: {"renoise": renoise})
    assert main(["bench", "--part", "kernels", "--cpu", "--out", str(tmp_path)]) == 1
    assert "renoise, closed: its largest error is" in capsys.readouterr().out
