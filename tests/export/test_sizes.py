"""A student of a teacher that shifts its times by the size, at other sizes than the trained one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import TINY, tiny_flow

import fewstep
from fewstep.config.run import RunConfig
from fewstep.diffusion.phases import Phase
from fewstep.errors import UserError
from fewstep.export import ExportError, export_student, plan_student
from fewstep.export.phased import phased_plan
from fewstep.export.walk.size_checks import check_sizes
from fewstep.export.walk.sizes import SizeShift
from fewstep.recording import record
from fewstep.recording.pipeline import with_parts

FLUX = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def shift_of(tokens):
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def even(steps, shift):
    return [shift * i / (steps + (shift - 1) * i) for i in range(steps, 0, -1)]


@pytest.fixture(scope="module")
def flux(zoo):
    """The zoo's Flux at 64 pixels: 1,024 tokens."""
    call = json.loads((zoo / "manifest.json").read_text())["Flux"]["call"]
    pipeline = DiffusionPipeline.from_pretrained(zoo / "Flux")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLUX)
    return record(pipeline, **{**call, "height": 64, "width": 64})


@pytest.fixture(scope="module")
def stable_diffusion_3():
    """It passes no sigmas of its own: its scheduler makes the list, down to its own smallest."""
    pipeline = tiny_flow()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLUX)
    return record(pipeline, **TINY["flow"][1])


def written(recording, trained, folder, **wish):
    plan = plan_student(recording, 4, **wish)
    export_student(recording, trained(recording), plan, folder, method="dmd2", base_model="example/teacher")
    return plan, json.loads((folder / "fewstep.json").read_text()), (folder / "README.md").read_text()


def times(folder, side):
    """The times that stock diffusers visits at a size, as shares of 1000."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    call = json.loads((folder / "fewstep.json").read_text())["call"]
    pipeline("a b lower", **{**call, "height": side, "width": side}, output_type="latent")
    return (pipeline.scheduler.timesteps / 1000).tolist()


def test_a_static_student_says_what_it_does_at_other_sizes(flux, trained, tmp_path):
    plan, about, card = written(flux, trained, tmp_path / "s")
    assert not plan.dynamic
    assert plan.sizes[0] == SizeShift({"height": 64, "width": 64}, plan.shift)
    assert {(one.size["height"], one.size["width"]): one.shift for one in plan.sizes} == pytest.approx(
        {(64, 64): shift_of(1024), (32, 32): shift_of(256), (128, 64): shift_of(2048)}
    )
    assert about["dynamic_shift"]["kept"] is False
    assert "## Other sizes" in card and "static" in card
    assert "| 64x64 | 1.878 | 1.878 |" in card
    assert f"| 32x32 | {shift_of(256):.4g} | 1.878 |" in card
    assert times(tmp_path / "s", 32) == pytest.approx(even(4, plan.shift), rel=1e-5)  # as it says


@pytest.mark.parametrize("renoise", ["auto", "fresh"])
def test_a_dynamic_student_has_its_teachers_shift_at_every_size(flux, trained, tmp_path, renoise):
    plan, about, card = written(flux, trained, tmp_path / "s", dynamic_shift="keep", renoise=renoise)
    assert plan.dynamic and plan.scheduler.config.use_dynamic_shifting
    assert plan.grid == pytest.approx(even(4, shift_of(1024)), rel=1e-5)
    assert plan.counts == (1, 2, 3, 4)
    for one in plan.sizes:
        assert one.grid == pytest.approx(even(4, one.shift), rel=1e-5)
    for side in (32, 64, 96):
        assert times(tmp_path / "s", side) == pytest.approx(even(4, shift_of((side // 2) ** 2)), rel=1e-5)
    assert about["dynamic_shift"]["kept"] is True
    assert [row["grid"] for row in about["dynamic_shift"]["sizes"]] == [list(one.grid) for one in plan.sizes]
    assert "does the same" in card and "not trained" in card


def test_a_pipeline_that_makes_its_own_list_cannot_keep_the_shift(stable_diffusion_3):
    with pytest.raises(ExportError, match="static") as caught:
        plan_student(stable_diffusion_3, 4, dynamic_shift="keep")
    assert "makes its own grid" in str(caught.value) and "\n" not in str(caught.value)
    plan = plan_student(stable_diffusion_3, 4)
    assert plan.sizes[0].size == {"height": 16, "width": 16}
    assert plan.grid == pytest.approx(even(4, shift_of(16)), rel=1e-4)


def test_a_student_of_a_static_teacher_says_nothing_and_keeps_nothing(recorded, trained, tmp_path):
    plan, about, card = written(recorded("flow"), trained, tmp_path / "s")
    assert plan.sizes == ()
    assert "dynamic_shift" not in about and "Other sizes" not in card
    for name in ("flow", "stable_diffusion", "edm"):
        with pytest.raises(ExportError, match="leave it out"):
            plan_student(recorded(name), 2, dynamic_shift="keep")


def test_a_stated_shift_is_the_students_at_every_size(flux, trained, tmp_path):
    plan, about, _ = written(flux, trained, tmp_path / "s", shift=3.0)
    assert (plan.shift, about["dynamic_shift"]["shift"]) == (3.0, 3.0)
    assert about["dynamic_shift"]["sizes"][0]["teacher_shift"] == pytest.approx(shift_of(1024))
    with pytest.raises(ExportError, match="leave one"):
        plan_student(flux, 4, shift=3.0, dynamic_shift="keep")


def test_a_size_that_the_call_does_not_name_is_the_pipelines_own(zoo):
    call = json.loads((zoo / "manifest.json").read_text())["Flux"]["call"]
    pipeline = DiffusionPipeline.from_pretrained(zoo / "Flux")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLUX)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = 32 // pipeline.vae_scale_factor
    recording = record(pipeline, **{name: value for name, value in call.items() if name not in ("height", "width")})
    assert plan_student(recording, 2).sizes[0] == SizeShift({"height": 32, "width": 32}, shift_of(256))


def test_a_student_of_another_call_than_the_planned_one_is_refused(flux):
    plan = plan_student(flux, 2)
    pipeline = with_parts(flux.pipeline, scheduler=plan.scheduler)
    check_sizes(flux, pipeline, plan, plan.call)
    with pytest.raises(ExportError, match=r"planned for 1\.878"):
        check_sizes(flux, pipeline, plan, {**plan.call, "height": 32})
    dynamic = plan_student(flux, 2, dynamic_shift="keep")
    moved = replace(dynamic, sizes=(*dynamic.sizes[:-1], replace(dynamic.sizes[-1], grid=(1.0, 0.4))))
    with pytest.raises(ExportError, match="other sizes"):
        check_sizes(flux, with_parts(flux.pipeline, scheduler=dynamic.scheduler), moved, plan.call)


def test_phases_do_not_move_with_the_size(flux):
    plan = plan_student(flux, 2, dynamic_shift="keep")
    middle = plan.grid[1]
    phases = [Phase(range(1), 1.0, 1.0, middle, middle), Phase(range(1, 2), middle, middle, None, 0.0)]
    with pytest.raises(UserError, match="dynamic_shift"):
        phased_plan(plan, phases)


def test_the_flag_takes_two_words():
    assert RunConfig(teacher="t", out="o").dynamic_shift == "static"
    assert RunConfig(teacher="t", out="o", dynamic_shift="keep").dynamic_shift == "keep"
    with pytest.raises(UserError, match="static"):
        RunConfig(teacher="t", out="o", dynamic_shift="always")


def test_a_dynamic_student_is_sampled_by_fewstep_at_another_size(flux, trained, tmp_path):
    written(flux, trained, tmp_path / "s", dynamic_shift="keep")
    pipeline = fewstep.load(tmp_path / "s")
    image = pipeline(
        "a b lower", height=32, width=32, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert tuple(image.shape[-2:]) == (32, 32) and bool(image.isfinite().all())
