"""The methods with a critic, a twin or stages in half precision: through to a student that samples."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from fewstep.programs.distillation import distill
from fewstep.recording.watch.shake import shaken
from tests.end_to_end.method_cases import CASES, RUN, images
from tests.stock_process import sample_stock
from tests.tiny_pipelines import tiny_dit

CASES_IN_HALVES = ("snoopi", "mdt_dist", "multi_student, smaller", "flash_dmd", "disback", "hyper_sd")
CASES_IN_HALVES += ("twin_flow", "any_flow")


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES_IN_HALVES)
def test_a_run_in_half_precision_ends_in_a_student_that_samples(tmp_path: Path, case: str) -> None:
    """Each step's numbers are finite, and so are the latents of stock diffusers at every count."""
    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        teacher = copy.deepcopy(pipeline)
    method, own = CASES[case]
    settings = {**RUN, "batch_size": 2, "mixed_precision": "bf16", **own, "ema_decay": 0.5}
    settings.pop("init", None)
    if "data" in settings:
        settings["data"] = images(tmp_path / "images")
    folder = distill(teacher, method, out=str(tmp_path / "run"), **settings)
    (one,) = sample_stock(tmp_path / "sampled.npz", folder)
    assert one.latents and all(bool(latents.isfinite().all()) for latents in one.latents.values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == RUN["max_steps"]
    assert all(value == value for row in rows for value in row.values()), rows
