"""The walk finds a relative that would be wrong: each fault of its own, planted in a stock class."""

from __future__ import annotations

import functools
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines import auto_pipeline

from fewstep.export import plan_student
from fewstep.export.related import walk as related_walk
from fewstep.export.related.classes import related_classes, related_names
from fewstep.export.related.ranges import Outcome, Range, at, nearest, ranges
from fewstep.recording import Recording

Recorded = Callable[[str], Recording]


class OffGrid(StableDiffusion3Img2ImgPipeline):
    """Asks for one step more than it was told."""

    @functools.wraps(StableDiffusion3Img2ImgPipeline.__call__)
    def __call__(self, *args: Any, num_inference_steps: int = 50, **kwargs: Any) -> Any:
        return super().__call__(*args, num_inference_steps=num_inference_steps + 1, **kwargs)


class TooNoisy(StableDiffusionImg2ImgPipeline):
    """Noises its picture to the top, wherever it then starts."""

    def prepare_latents(self, image: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return super().prepare_latents(image, torch.full_like(timestep, 999), *args, **kwargs)


class Forgetful(StableDiffusionInpaintPipeline):
    """Keeps nothing of its picture between the steps: the mask covers all of it."""

    @functools.wraps(StableDiffusionInpaintPipeline.__call__)
    def __call__(self, *args: Any, mask_image: Any = None, **kwargs: Any) -> Any:
        return super().__call__(*args, mask_image=mask_image.point(lambda _: 255), **kwargs)


class Guided(StableDiffusionImg2ImgPipeline):
    """Guides whatever it is told."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return True


class Talkative(StableDiffusionImg2ImgPipeline):
    """Tells its network something that the student was never told."""

    @functools.wraps(StableDiffusionImg2ImgPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.unet.forward

        def more(*inner: Any, **named: Any) -> Any:
            return forward(*inner, **named, timestep_cond=torch.zeros(1, 8))

        self.unet.forward = more
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.unet.forward = forward


def walked(monkeypatch: pytest.MonkeyPatch, recording: Recording, steps: int, renoise: str, *kinds: type) -> Any:
    """The record of some classes in the place of the family's."""
    monkeypatch.setattr(related_walk, "related_classes", lambda _stock: kinds)
    monkeypatch.setattr(related_walk, "_WALKED", {})
    return related_walk.walk_relatives(recording, plan_student(recording, steps, renoise=renoise))


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("flow", OffGrid, "not on the student's grid"),
        ("stable_diffusion", Guided, r"of shape \[2, 4, 8, 8\]"),
        ("stable_diffusion", Talkative, "timestep_cond"),
    ],
)
def test_a_wrong_relative_is_found(
    monkeypatch: pytest.MonkeyPatch, recorded: Recorded, name: str, kind: type, reason: str
) -> None:
    """At every strength, so that the class is refused as a whole."""
    record = walked(monkeypatch, recorded(name), 2, "ode", kind)[kind.__name__]
    assert "counts" not in record
    assert re.search(reason, record["why_not"]), record["why_not"]


def test_a_picture_noised_to_another_time_is_found(monkeypatch: pytest.MonkeyPatch, recorded: Recorded) -> None:
    """The calls and times of this class are right; its first sample is not."""
    recording = recorded("stable_diffusion")
    right = walked(monkeypatch, recording, 2, "ode", StableDiffusionImg2ImgPipeline)
    wrong = walked(monkeypatch, recording, 2, "ode", TooNoisy)["TooNoisy"]
    assert "why_not" not in right["StableDiffusionImg2ImgPipeline"]
    assert "counts" not in wrong


def test_of_many_counts_some_are_walked(monkeypatch: pytest.MonkeyPatch, recorded: Recorded) -> None:
    """The student's own among them, where a fault is found as at the others."""
    kinds = (StableDiffusionImg2ImgPipeline, TooNoisy)
    found = walked(monkeypatch, recorded("stable_diffusion"), 6, "fresh", *kinds)
    right = found["StableDiffusionImg2ImgPipeline"]["counts"]
    assert list(right) == ["1", "2", "3", "4", "6"]
    assert [row.get("calls") for row in right["6"]] == [None, 1, 2, 3, 4, 5, None]
    assert "counts" not in found["TooNoisy"]


@pytest.mark.parametrize("renoise", ["ode", "fresh"])
def test_a_strength_that_leaves_no_step_says_so(
    monkeypatch: pytest.MonkeyPatch, recorded: Recorded, renoise: str
) -> None:
    """Of every class that rounds down, under every scheduler, in the same words, so that they share a table."""
    kinds = (
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
        diffusers.StableDiffusionControlNetInpaintPipeline,
    )
    found = walked(monkeypatch, recorded("stable_diffusion"), 2, renoise, *kinds)
    assert [found[kind.__name__]["counts"]["2"][0] for kind in kinds] == [
        {"above": 0.0, "below": 0.5, "why_not": "it makes no step"}
    ] * len(kinds)


def test_inpainting_at_the_top_is_right_only_if_the_picture_stays(
    monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    """It starts from noise, and heeds its picture by what it keeps between the steps."""
    recording = recorded("stable_diffusion")
    for kind, whys in ((StableDiffusionInpaintPipeline, None), (Forgetful, "ignores the picture")):
        record = walked(monkeypatch, recording, 2, "ode", kind)[kind.__name__]
        top = Range.from_json(record["counts"]["2"][-1])
        assert top.holds(1.0)
        assert top.outcome.calls == 2 if whys is None else whys in str(top.outcome.why_not)


def test_flow_ignores_the_picture_above_its_last_but_one_step(
    monkeypatch: pytest.MonkeyPatch, recorded: Recorded
) -> None:
    """Above 1 - 1/n the first time is 1, where the picture has no part; a student of one step is always there."""
    kind = StableDiffusion3Img2ImgPipeline
    record = walked(monkeypatch, recorded("flow"), 4, "ode", kind)[kind.__name__]
    four = [Range.from_json(row) for row in record["counts"]["4"]]
    assert [(row.low, row.high, row.outcome.calls) for row in four] == [
        (0, 0.25, 1),
        (0.25, 0.5, 2),
        (0.5, 0.75, 3),
        (0.75, 1, None),
    ]
    (one,) = record["counts"]["1"]
    assert "ignores" in one["why_not"]
    alone = walked(monkeypatch, recorded("flow"), 1, "ode", kind)[kind.__name__]
    assert "ignores" in alone["why_not"]


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, recorded: Recorded) -> None:
    """Some classes exchange the attention of the network that they are given; the teacher's stays as it was."""
    recording = recorded("stable_diffusion")
    before = {name: type(processor) for name, processor in recording.network.attn_processors.items()}
    walked(monkeypatch, recording, 2, "ode", diffusers.StableDiffusionControlNetPAGPipeline)
    assert before == {name: type(processor) for name, processor in recording.network.attn_processors.items()}
    assert "forward" not in vars(recording.network) and "encode" not in vars(recording.pipeline.vae)


def test_classes_whose_packages_are_missing_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers says it: a stand-in class, or an error when the name is asked for."""
    package = sys.modules["diffusers.pipelines.stable_diffusion"]
    names = related_names(StableDiffusionPipeline)
    lacking = types.ModuleType(package.__name__)

    def lookup(name: str) -> Any:
        if name == "StableDiffusionImg2ImgPipeline":
            raise RuntimeError("Failed to import it because of: No module named 'peft_from_tomorrow'")
        if name == "StableDiffusionInpaintPipeline":
            return type(name, (), {"_backends": ["onnx"], "__call__": lambda self, image: None})
        return getattr(package, name)

    lacking.__getattr__ = lookup  # type: ignore[method-assign]
    lacking.__dict__.update(dict.fromkeys(()))
    monkeypatch.setitem(sys.modules, package.__name__, lacking)
    monkeypatch.setattr("fewstep.export.related.classes.related_names", lambda _stock: names)
    monkeypatch.setattr("fewstep.export.related.classes.diffusers", lacking)
    found = {kind.__name__ for kind in related_classes(StableDiffusionPipeline)}
    assert {"StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"}.isdisjoint(found)
    assert "StableDiffusionInstructPix2PixPipeline" in found


def test_the_tables_of_autopipeline_hold_no_relative_that_is_not_found() -> None:
    """They lack some families; no family's entry is lacking here."""
    text = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING | auto_pipeline.AUTO_TEXT2VIDEO_PIPELINES_MAPPING
    tables = [
        getattr(auto_pipeline, f"AUTO_{kind}_PIPELINES_MAPPING")
        for kind in ("IMAGE2IMAGE", "INPAINT", "IMAGE2VIDEO", "VIDEO2VIDEO")
    ]
    families = (
        "stable-diffusion",
        "stable-diffusion-xl",
        "stable-diffusion-3",
        "flux",
        "qwenimage",
        "z-image",
        "wan",
        "ltx",
    )
    for family in families:
        names = set(related_names(text[family]))
        assert {table[family].__name__ for table in tables if family in table} <= names


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (lambda n, s: int(n * s), [(0, 0.25, None), (0.25, 0.5, 1), (0.5, 0.75, 2), (0.75, 1, 3), (1, 1, 4)]),
        (lambda n, s: n - int(n - n * s), [(0, 0.25, 1), (0.25, 0.5, 2), (0.5, 0.75, 3), (0.75, 1, 4)]),
    ],
)
def test_ranges_of_both_roundings(calls: Callable[[int, float], int], expected: list[Any]) -> None:
    """One rounds down, so that a range holds its lower end; the other rounds up."""

    def run(strength: float) -> Outcome:
        made = calls(4, strength)
        return Outcome(made, 1.0, 1.0) if made else Outcome(why_not="none")

    rows = ranges(4, run)
    assert [(row.low, row.high, row.outcome.calls) for row in rows] == expected
    assert [Range.from_json(row.as_json()) for row in rows] == rows
    for strength in (0.01, 0.2, 0.25, 0.2501, 0.5, 0.6, 0.75, 0.9999, 1.0):
        row = at(rows, strength)
        assert row is not None and (row.outcome.calls or 0) == calls(4, strength)
        near = nearest(rows, strength)
        assert near is not None and calls(4, near) > 0
    assert at(rows, 0.0) is None and at(rows, 1.01) is None


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("calls", [lambda n, s: int(n * s), lambda n, s: n - int(n - n * s)])
def test_strengths_of_four_digits_are_told_right_where_a_step_is_no_such_number(
    calls: Callable[[int, float], int], count: int
) -> None:
    """2/3 has no end: what the card and a refusal say is rounded to the side that is true."""

    def run(strength: float) -> Outcome:
        made = calls(count, strength)
        return Outcome(made, float(made), 1.0) if 0 < made < count else Outcome(why_not="none")

    rows = ranges(count, run)
    shown = [Range(*row.shown_ends(), row.holds_low, row.holds_high, row.outcome) for row in rows]
    for strength in [k / 1000 for k in range(1, 1001)] + [0.3333, 0.3334, 0.6666, 0.6667, 2 / 3, 1 / 3]:
        told, near = at(shown, round(strength, 4)), nearest(rows, strength)
        assert told is not None and told.outcome == run(round(strength, 4)), strength
        if near is not None:
            typed = at(rows, near if near == strength else float(f"{near:.4f}"))
            assert typed is not None and typed.outcome.why_not is None, (strength, near)
