"""``fewstep.load(pipeline=...)``: which class it loads, what that fills in, and what it refuses or warns of."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxKontextPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from relatives import picture, run
from toys import adapter_role

from fewstep.export import ExportError, apply, export_lora, export_student, load, plan_student
from fewstep.export.heeded import what_is_not_heeded
from fewstep.networks.adapters import Backbone
from fewstep.recording import Recording, record

pytestmark = pytest.mark.usefixtures("with_relatives")


@pytest.fixture(scope="module")
def student(recorded: Callable[[str], Recording], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of four steps, by fresh noise."""
    recording = recorded("stable_diffusion")
    out = tmp_path_factory.mktemp("related") / "student"
    return export_student(
        recording, recording.network, plan_student(recording, 4), out, method="dmd2", base_model="example/teacher"
    )


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        ("image-to-image", StableDiffusionImg2ImgPipeline),
        ("StableDiffusionImg2ImgPipeline", StableDiffusionImg2ImgPipeline),
        (StableDiffusionImg2ImgPipeline, StableDiffusionImg2ImgPipeline),
        ("inpainting", StableDiffusionInpaintPipeline),
        ("text-to-image", StableDiffusionPipeline),
    ],
)
def test_a_class_its_name_or_its_task_is_loaded(student: Path, wanted: Any, kind: type) -> None:
    """And what it saves names the stock class and can be loaded the same way again."""
    pipeline = load(student, pipeline=wanted)
    assert isinstance(pipeline, kind) and type(pipeline) is not kind
    assert type(pipeline).__name__ == kind.__name__


def test_the_call_is_filled_in(student: Path) -> None:
    """A plain ``from_pretrained`` or ``from_pipe`` of the same class makes 40 guided calls."""
    pipeline = load(student, pipeline="image-to-image")
    pipeline.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[0])))
    pipeline("the cat", image=picture(16))
    assert rows == [1, 1, 1]  # of four steps at the class's own strength of 0.8, unguided


def test_a_strength_that_would_be_wrong_is_refused_before_anything_runs(student: Path) -> None:
    """With the nearest one that works, which does."""
    pipeline = load(student, pipeline="image-to-image")
    pipeline.set_progress_bar_config(disable=True)
    calls: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for strength, advice in (
        (1.0, r"0\.99 \(3 calls from timestep 749\)"),
        (0.2, r"0\.25 \(1 call from timestep 249\)"),
    ):
        with pytest.raises(ExportError, match=f"nearest strength that works is {advice}") as refusal:
            pipeline("the cat", image=picture(16), strength=strength)
        assert "\n" not in str(refusal.value) and calls == []
    with pytest.raises(ExportError, match=r"at 1 steps.*take 2 or 3 or 4 steps"):
        pipeline("the cat", image=picture(16), num_inference_steps=1)
    assert run(pipeline, "unet", prompt="the cat", image=picture(16), strength=0.25)[:2] == (1, 249.0)


def test_a_count_that_was_not_tried_with_pictures_is_warned_of(student: Path, tmp_path: Path) -> None:
    """The student itself is right there."""
    about = json.loads((student / "fewstep.json").read_text())
    del about["related"]["StableDiffusionImg2ImgPipeline"]["counts"]["3"]
    (shutil.copytree(student, tmp_path / "many") / "fewstep.json").write_text(json.dumps(about))
    pipeline = load(tmp_path / "many", pipeline="image-to-image")
    pipeline.set_progress_bar_config(disable=True)
    for count, expected in ((3, 1), (4, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline("the cat", image=picture(16), num_inference_steps=count, strength=0.7)
        told = [str(warning.message) for warning in caught if "this student" in str(warning.message)]
        assert len(told) == expected, told
        assert all("under StableDiffusionImg2ImgPipeline at 1, 2, 4 steps, not at 3" in text for text in told)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (StableDiffusionInstructPix2PixPipeline, "not for StableDiffusionInstructPix2PixPipeline"),
        (StableDiffusionXLImg2ImgPipeline, "not tried under StableDiffusionXLImg2ImgPipeline; there are Stable"),
        ("image-to-video", "not tried under image-to-video"),
        ("no such thing", "not tried under no such thing"),
        ("controlnet", r"give controlnet=\.\.\."),
    ],
)
def test_other_pipelines_are_refused(student: Path, wanted: Any, reason: str) -> None:
    """One line says why, or what there is."""
    with pytest.raises(ExportError, match=reason):
        load(student, pipeline=wanted)


@pytest.mark.parametrize("lacking", [("related",), ("related", "pipeline", "example", "load")])
def test_a_student_of_an_older_version_says_that_nothing_was_tried(
    student: Path, tmp_path: Path, lacking: tuple[str, ...]
) -> None:
    """Its own pipeline loads as ever; what it would be under others is not known, and not called wrong."""
    old = shutil.copytree(student, tmp_path / "old")
    about = json.loads((old / "fewstep.json").read_text())
    kept = {name: value for name, value in about.items() if name not in lacking}
    (old / "fewstep.json").write_text(json.dumps(kept))
    assert type(load(old)).__name__ == "StableDiffusionPipeline"
    for wanted in ("image-to-image", StableDiffusionImg2ImgPipeline):
        with pytest.raises(ExportError, match=r"not tried under .*older fewstep .* --resume of its run exports it"):
            load(old, pipeline=wanted)


def test_a_control_network_is_given(student: Path) -> None:
    """The pipeline's call is the student's."""
    unet = load(student).unet
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    pipeline = load(student, pipeline="controlnet", controlnet=control)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, StableDiffusionControlNetPipeline)
    assert run(pipeline, "unet", prompt="the cat", image=picture(16))[:2] == (4, 999.0)


def test_what_a_relative_saves_is_a_student(student: Path, tmp_path: Path) -> None:
    """Of the relative's class."""
    load(student, pipeline="inpainting").save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert isinstance(again, StableDiffusionInpaintPipeline)
    assert again.fewstep["related"] == load(student).fewstep["related"]


def test_a_lora_student_loads_as_a_relative(recorded: Callable[[str], Recording], tmp_path: Path) -> None:
    """Of its base model; and a base under which the student is wrong is left as it was."""
    recording = recorded("stable_diffusion")
    recording.pipeline.save_pretrained(tmp_path / "base")
    role = adapter_role("student", Backbone(recording.network, 4, 4), recording)
    plan = plan_student(recording, 2, renoise="ode")
    folder = export_lora(recording, role, plan, tmp_path / "lora", method="dmd2", base_model="example/teacher")
    pipeline = load(folder, base=tmp_path / "base", pipeline="image-to-image")
    pipeline.set_progress_bar_config(disable=True)
    assert run(pipeline, "unet", prompt="the cat", image=picture(16), strength=0.6)[:2] == (1, 499.0)
    other = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    scheduler = other.scheduler
    with pytest.raises(ExportError, match="not for StableDiffusionInstructPix2PixPipeline"):
        apply(other, folder)
    assert other.scheduler is scheduler and not hasattr(other.unet, "peft_config")


@pytest.mark.parametrize(
    ("given", "usual", "guidance_range", "words"),
    [
        (
            {"guidance_scale": 7.5},
            {"guidance_scale": 1.0},
            None,
            "guidance_scale=1 alone, so leave out guidance_scale=7.5",
        ),
        ({"true_cfg_scale": 4.0}, {"true_cfg_scale": 1.0, "guidance_scale": 3.5}, None, "leave out true_cfg_scale=4"),
        ({"guidance_scale": 7.0}, {"true_cfg_scale": 1.0, "guidance_scale": 3.5}, None, "guidance_scale=3.5 alone"),
        ({"negative_prompt": "ugly"}, {"guidance_scale": 1.0}, None, "leave out negative_prompt"),
        ({"negative_prompt": ["", "ugly"]}, {"guidance_scale": 1.0}, (2, 8), "leave out negative_prompt"),
        ({"negative_prompt_embeds": torch.zeros(1)}, {}, None, "leave out negative_prompt_embeds"),
        ({"guidance_scale": 9.0}, {"guidance_scale": 4.0}, (2, 8), "guidance_scale from 2 to 8 alone"),
        ({"guidance_scale": 6.0}, {"guidance_scale": 4.0}, (2, 8), None),
        ({"guidance_scale": 0.0}, {"guidance_scale": 1.0}, None, None),
        ({"guidance_scale": 1.0, "negative_prompt": "", "prompt": "x"}, {"guidance_scale": 1.0}, None, None),
        ({"negative_prompt": None, "guidance_rescale": 0.7}, {"guidance_scale": 1.0}, None, None),
    ],
)
def test_what_a_student_cannot_heed(
    given: dict[str, Any], usual: dict[str, Any], guidance_range: tuple[float, float] | None, words: str | None
) -> None:
    """A negative prompt, and a guidance that it was not trained at."""
    told = what_is_not_heeded(given, usual, guidance_range)
    assert told is None if words is None else words in told


def test_one_warning_for_all_that_is_not_heeded(student: Path) -> None:
    """Whatever is given at once; a right call has none."""
    pipeline = load(student)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="guidance in its weights") as seen:
        pipeline("the cat", negative_prompt="ugly", guidance_scale=7.5)
    assert len([warning for warning in seen if "guidance in its weights" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline("the cat")


def test_an_editing_pipeline_says_that_no_picture_was_trained(zoo: Path, tmp_path: Path) -> None:
    """Flux Kontext works from a prompt alone, and is distilled so; its users give it a picture."""
    stock = DiffusionPipeline.from_pretrained(zoo / "Flux", local_files_only=True)
    call = {"height": 8, "width": 8, "max_sequence_length": 48, "max_area": 64}
    recording = record(FluxKontextPipeline(**stock.components), prompt="a", **call)
    plan = plan_student(recording, 2, renoise="ode")
    folder = export_student(recording, recording.network, plan, tmp_path / "student", method="dmd2", base_model="a/b")
    assert "`FluxKontextPipeline` also takes `image`. This student was trained" in (folder / "README.md").read_text()
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="trained without pictures, so what it makes of image is not known"):
        pipeline(prompt="a", image=picture(16), _auto_resize=False)  # which would make it a thousand pixels wide
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline(prompt="a")


def test_a_refusal_names_a_strength_that_works_at_three_steps(
    recorded: Callable[[str], Recording], tmp_path: Path
) -> None:
    """A flow's picture counts up to 2/3 of the way there, which no decimal number is; and below, at the default."""
    recording = recorded("flow")
    plan = plan_student(recording, 3, renoise="ode")
    folder = export_student(
        recording, recording.network, plan, tmp_path / "student", method="dmd2", base_model="example/teacher"
    )
    pipeline = load(folder, pipeline="image-to-image")
    pipeline.set_progress_bar_config(disable=True)
    for strength in (0.7, 1.0):
        with pytest.raises(
            ExportError, match=r"nearest strength that works is 0\.6666 \(2 calls from timestep"
        ) as refusal:
            pipeline("the cat", image=picture(16), strength=strength)
        assert "ignores the picture" in str(refusal.value)
    assert run(pipeline, "transformer", prompt="the cat", image=picture(16), strength=0.6666)[0] == 2
    assert "to 0.6666 |" in (folder / "README.md").read_text()
