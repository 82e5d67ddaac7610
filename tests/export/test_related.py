"""Relatives of a student's pipeline: the card's table is what happens, and what would be wrong is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline_folder
import pytest
import torch
from diffusers import DiffusionPipeline
from relatives import STRENGTHS, about_of, promises, real, run, shown

from fewstep.export import ExportError, plan_student
from fewstep.export.card.card import PLACEHOLDER
from fewstep.export.card.related import related_section
from fewstep.recording import Recording, record

Recorded = Callable[[str], Recording]
# Of the folder of pipelines: those whose family has a pipeline that takes a picture.
_FAMILIES = (
    "Chroma",
    "CogVideoX",
    "Flux",
    "HunyuanVideo",
    "LTX",
    "QwenImage",
    "Sana",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "Wan",
    "ZImage",
)


def check_matrix(
    recording: Recording, steps: int, renoise: str, counts: tuple[int, ...] = (1, 2, 4), *, control: bool = True
) -> dict[str, Any]:
    """Every relative at every count and strength: as its card says, or refused with a strength that works."""
    plan = plan_student(recording, steps, renoise=renoise)
    about = about_of(recording, plan)
    tables = promises(about)
    assert tables.keys() == {name for name, record in about["related"].items() if "why_not" not in record}
    for name, rows in tables.items():
        if "ControlNet" in name and (not control or recording.component != "unet"):
            continue  # the control networks that diffusers makes of a transformer fit none of another size than its own
        pipeline = real(recording, plan, name, about)
        arguments = {"prompt": recording.invocation.item, **shown(recording, type(pipeline).__mro__[1])}
        for count in sorted(set(counts) & set(plan.counts)):
            strengths = STRENGTHS if "strength" in about["related"][name]["call"] else (None,)
            for strength in strengths:
                (row,) = [row for row in rows if row.steps == count and row.holds(strength or 1.0)]
                call = {**arguments, "num_inference_steps": count}
                call |= {} if strength is None else {"strength": strength}
                where = f"{name} at {count} steps, strength {strength}"
                if row.calls.startswith("refused"):
                    with pytest.raises(ExportError) as refusal:
                        pipeline(**call)
                    advice = r"the nearest strength that works is \S+ \(|take [\d or]+ steps"
                    assert re.search(advice, str(refusal.value)), where
                    if found := re.search(r"works is (\S+) \((\d+) call", str(refusal.value)):
                        call["strength"] = float(found[1])
                        assert run(pipeline, recording.component, **call)[0] == int(found[2]), where
                    continue
                calls, timestep, _ = run(pipeline, recording.component, **call)
                time = float(recording.schedule.time(torch.tensor([timestep], dtype=torch.float64)))
                assert calls == int(row.calls), where
                assert time == pytest.approx(float(row.time), abs=1e-3), where
                assert any(time == pytest.approx(t, abs=1e-4) for t in plan.grids[count]), where
    return about


@pytest.mark.parametrize(
    ("name", "steps", "renoise"),
    [
        ("stable_diffusion", 2, "ode"),
        ("flow", 1, "fresh"),
        pytest.param("stable_diffusion", 4, "fresh", marks=pytest.mark.soak),
        pytest.param("flow", 4, "ode", marks=pytest.mark.soak),
    ],
)
def test_card_is_what_happens(recorded: Recorded, name: str, steps: int, renoise: str) -> None:
    """The networks and the decoder are real here; the walk had stand-ins."""
    assert check_matrix(recorded(name), steps, renoise, (steps,), control=False)["related"]


def test_control_networks_are_walked_alike(recorded: Recorded) -> None:
    """With a real one, made from the student's network as diffusers makes it."""
    recording = recorded("stable_diffusion")
    plan = plan_student(recording, 2, renoise="ode")
    about = about_of(recording, plan)
    name = "StableDiffusionControlNetImg2ImgPipeline"
    pipeline = real(recording, plan, name, about)
    arguments = {"prompt": "the cat", **shown(recording, type(pipeline).__mro__[1])}
    assert about["related"][name]["task"] == "controlnet-image-to-image"
    assert run(pipeline, "unet", **arguments, strength=0.6)[:2] == (1, 499.0)
    with pytest.raises(ExportError, match=r"ignores the picture.* nearest strength that works is 0\.99"):
        pipeline(**arguments, strength=1.0)


def test_the_page_says_how_strengths_are_rounded(recorded: Recorded) -> None:
    """One class of each rounding, by the page's own row."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "pictures.md").read_text()
    down = ("down", "stable_diffusion", "StableDiffusionImg2ImgPipeline")
    for row, name, kind in (down, ("up", "flow", "StableDiffusion3Img2ImgPipeline")):
        (cell,) = re.findall(rf"^\| {row} \| [^|]* \| ([^|]*) \|", page, re.MULTILINE)
        about = about_of(recorded(name), plan_student(recorded(name), 4, renoise="ode"))
        rows = [[r for r in promises(about)[kind] if r.steps == 4 and r.holds(s)] for s in STRENGTHS[:3]]
        told = ["none" if found.calls.startswith("refused") else found.calls for (found,) in rows]
        assert cell == ", ".join(told)


@pytest.mark.soak
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("renoise", ["ode", "fresh"])
@pytest.mark.parametrize("family", _FAMILIES)
def test_card_is_what_happens_in_every_family(zoo: Path, family: str, renoise: str, steps: int) -> None:
    """All families of the folder of pipelines that have a relative."""
    pipeline = DiffusionPipeline.from_pretrained(zoo / family)
    pipeline.set_progress_bar_config(disable=True)
    recording = record(pipeline, **pipeline_folder.call_of(zoo, family, pipeline))
    try:
        check_matrix(recording, steps, renoise)
    except ExportError as error:
        if "cannot ship" not in str(error):
            raise
        pytest.skip(str(error))


def test_the_card_names_the_package_that_a_relative_needs() -> None:
    """What fewstep.load would refuse until it is there."""
    row = {"from": 0, "to": 1, "calls": 2, "timestep": 999.0, "time": 1.0}
    own: dict[str, Any] = {"task": "video-to-video", "images": ["video"], "call": {}, "counts": {"2": [row]}}
    for needs, told in (({"needs": "ftfy"}, True), ({}, False)):
        text = related_section({"counts": [2], "related": {"WanVideoToVideoPipeline": own | needs}}, PLACEHOLDER) or ""
        assert ("`WanVideoToVideoPipeline`: `pip install ftfy` first." in text) == told
