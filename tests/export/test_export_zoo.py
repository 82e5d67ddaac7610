"""Tiny pipelines of many families, from a folder: each plans, walks and exports at 1, 2 and 4 steps."""

import json

import pytest
from diffusers import DiffusionPipeline

from fewstep.export import ExportError, export_student, load, plan_student
from fewstep.recording import record

#: Family -> whether fresh noise can ship under its pipeline.
FAMILIES = {
    "DDIM": False,
    "DiT": True,
    "StableDiffusion": True,
    "StableDiffusionXL": True,
    "StableDiffusion3": True,
    "Flux": True,
    "Sana": True,
    "Wan": True,
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family(zoo, trained, tmp_path, family):
    folder = zoo / family
    if not folder.is_dir():
        pytest.skip(f"no {family} in {zoo}")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    recording = record(pipeline, **json.loads((zoo / "manifest.json").read_text())[family]["call"])
    for steps in (1, 2, 4):
        plan = plan_student(recording, steps, renoise="ode")
        assert steps in plan.counts
        assert plan.grid[0] == 1.0
        if FAMILIES[family]:
            assert plan_student(recording, steps, renoise="fresh").renoise == "fresh"
        else:
            with pytest.raises(ExportError, match="eta"):
                plan_student(recording, steps, renoise="fresh")
    plan = plan_student(recording, 4)
    assert {2, 4} <= set(plan.counts)
    student = export_student(
        recording, trained(recording), plan, tmp_path / "student", method="dmd2", base_model=f"example/{family}"
    )
    assert type(load(student)).__name__ == type(pipeline).__name__
