"""The call that a student is shipped with is the one that was checked: as its fewstep.json gives it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.eval.sample import sample
from fewstep.export import export_student, load, plan_student, whole
from fewstep.recording import record

_SIZES = {"original_size": (64, 48), "crops_coords_top_left": (0, 8), "target_size": (64, 64)}


@pytest.fixture(scope="module")
def student(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained student of a teacher whose pipeline adds size tuples to each other."""
    if not (zoo / "StableDiffusionXL").is_dir():
        pytest.skip("needs StableDiffusionXL in --zoo DIR")
    pipeline = DiffusionPipeline.from_pretrained(zoo / "StableDiffusionXL", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(pipeline, prompt="a b", height=32, width=32, **_SIZES)
    recording.prove()
    out = tmp_path_factory.mktemp("sizes") / "student"
    plan = plan_student(recording, 2, renoise="ode")
    export_student(recording, recording.network, plan, out, method="dmd2", base_model="example/teacher")
    return out


def test_the_file_has_lists_and_the_pipeline_gets_tuples(student: Path) -> None:
    assert json.loads((student / "fewstep.json").read_text())["call"]["original_size"] == [64, 48]
    pipeline = load(student)
    pipeline.set_progress_bar_config(disable=True)
    stock = DiffusionPipeline.from_pretrained(student)
    stock.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, **_SIZES}
    images = [
        call("a b", generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
        for call, arguments in ((pipeline, {}), (stock, told))
    ]
    assert torch.equal(*images)


def test_the_cards_example_runs(student: Path) -> None:
    card = (student / "README.md").read_text()
    assert "original_size=(64, 48)," in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(student))
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["image"].size == (32, 32)


def test_it_is_sampled_for_people(student: Path, tmp_path: Path) -> None:
    assert sample(student, prompt="a b", out=str(tmp_path / "one.png"), seed=0).is_file()


def test_what_is_checked_is_the_shipped_call(student: Path, monkeypatch: pytest.MonkeyPatch, zoo: Path) -> None:
    """Not the one in memory: a file that lost an argument must not pass."""
    pipeline = DiffusionPipeline.from_pretrained(zoo / "StableDiffusionXL", local_files_only=True)
    recording = record(pipeline, prompt="a b", height=32, width=32)
    write = whole.write_about

    def without_size(folder: Path, about: dict[str, Any]) -> None:
        write(folder, {**about, "call": {**about["call"], "original_size": 5}})

    monkeypatch.setattr(whole, "write_about", without_size)
    plan = plan_student(recording, 1, renoise="ode")
    with pytest.raises(whole.ExportError, match="does not run"):
        export_student(recording, recording.network, plan, student.parent / "other", method="x", base_model="a/b")
