"""What evaluations during a training cost: as many as the loop makes, and calls by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.config.run import RunConfig
from fewstep.programs.planning.call_counts import Calls
from fewstep.programs.planning.evaluations import Evaluations, evaluations_of
from fewstep.training.best import Measure
from tests.toys import TinyMethod, make_loop

CALLS = {"student": Calls(no_grad=1, to_parameters=1)}  # 4 forward passes


def config(**settings: int | str) -> RunConfig:
    return RunConfig(**{"teacher": "tiny", "out": "", "report_to": "none", "sample_steps": 0, **settings})


@pytest.mark.parametrize(("max_steps", "eval_steps"), [(4, 2), (5, 2), (3, 10), (2, 1)])
def test_there_are_as_many_as_the_loop_makes(max_steps: int, eval_steps: int, tmp_path: Path) -> None:
    settings = config(out=str(tmp_path), max_steps=max_steps, eval_steps=eval_steps)
    seen: list[int] = []

    def note(step: int, pause: object) -> dict[str, float]:
        seen.append(step)
        return {"eval/fd": 1.0}

    make_loop(TinyMethod(), settings, on_evaluation=note, measure=Measure("fd", False, 256, "toy")).run()
    planned = evaluations_of(settings, False, CALLS)
    assert planned is not None and planned.count == len(seen)


def test_calls_by_hand() -> None:
    """3 evaluations of 10 samples at 4 steps; 10 of a guided teacher at 25; 100 steps of 2 times 5 samples before."""
    settings = {"max_steps": 100, "eval_steps": 50, "eval_samples": 10, "batch_size": 5}
    asked = config(**settings, gradient_accumulation_steps=2)
    assert evaluations_of(asked, True, CALLS) == Evaluations(3, 10, 120, 500, (120 + 500) / (100 * 2 * 5 * 4))
    assert evaluations_of(asked, False, CALLS) == Evaluations(3, 10, 120, 250, (120 + 250) / (100 * 2 * 5 * 4))
    embedded = config(**settings, teacher="fashion-sd")
    assert evaluations_of(embedded, True, CALLS) == Evaluations(3, 10, 120, 0, 120 / (100 * 5 * 4))


def test_a_run_without_has_none() -> None:
    assert evaluations_of(config(), True, CALLS) is None
