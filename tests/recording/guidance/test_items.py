"""Guided calls of pipelines that are told pictures: which answers they ask for, their weights, and each item's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from guided_pictures import WAYS, GuidedPictures, PlacedPictures, ThreeAnswers, guided_items, guided_pictures
from picture_pipeline import picture

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.rescaling import Rescaling
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.guidance.weighing import GuidedRun, weigh


def recorded(kind: type[GuidedPictures] = GuidedPictures, way: str = "one_call", **call: Any) -> Recording:
    return record(guided_pictures(kind, way), items=guided_items(kind), **call)


def errors(recording: Recording) -> dict[str, float]:
    proof = recording.prove()
    assert proof.swapped is not None and proof.swapped >= 1e-3
    return {check.name: check.error for check in proof.checks}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_guiding_is_recorded_and_proven(way: str) -> None:
    recording = recorded(way=way, guidance_scale=4.0)
    report, weighing, found = recording.guidance, recording.guidance.weighing, errors(recording)
    assert found["guided, each answer"] <= 1e-6 and found["guided, combined"] <= 1e-5
    more = 1.0 if way == "plus_one" else 0.0
    assert report.off_argument == ("guidance_scale", 0.0 if way == "plus_one" else 1.0)
    assert report.argument_scale == 4.0 and report.offset == more and recording.further == 1
    assert weighing is not None and weighing.scales == (4.0 + more,)
    rescaled = {"rescaled": Rescaling("tokens"), "deviation": Rescaling("deviation", 0.7)}
    rescaled["rescaled_channels"] = Rescaling("tokens", axis=-3)
    assert weighing.rescaled == rescaled.get(way) and report.linear is (way not in rescaled)
    assert report.calls == (2 if way in ("two_calls", "unsaid") else 1)
    wanted = {
        "dropped": "zeros in the place of the picture (hidden_states)",
        "other_picture": "another picture, or none, in hidden_states",
    }
    assert report.pictures == (wanted.get(way, "the item's picture"),)
    assert f"answer 2 is told {report.pictures[0]}" in report.describe()


def test_a_deviation_is_told_from_a_norm_in_samples_of_many_entries() -> None:
    """About a mean of 0 the two differ by less than rounding there."""
    items = [{**item, "image": picture(number, side=512)} for number, item in enumerate(guided_items())]
    recording = record(guided_pictures(way="deviation"), items=items)
    weighing = recording.guidance.weighing
    assert weighing is not None and weighing.rescaled == Rescaling("deviation", 0.7)


@pytest.mark.parametrize("way", ["one_call", "two_calls", "drawn"])
def test_each_items_negative_holds_its_own_picture(way: str) -> None:
    recording = recorded(way=way)
    items = guided_items(count=3)
    further = recording.negative_each(items)
    assert [len(answers) for answers in further] == [1, 1, 1]
    positive = recording.condition_each(items=items)
    pictures = [told.arguments()["hidden_states"] for told in positive]
    away = [answers[0].arguments()["hidden_states"] for answers in further]
    for k in range(3):
        torch.testing.assert_close(away[k], pictures[k])
        assert not torch.allclose(away[k], pictures[(k + 1) % 3])
        assert not torch.equal(further[k][0].arguments()["text"], positive[k].arguments()["text"])
        assert Conditioning.compatible(further[k][0], positive[k])
    if way == "drawn":
        assert not torch.equal(recording.negative_each(items[:1], seed=1)[0][0].arguments()["hidden_states"], away[0])


def test_three_answers_have_two_scales() -> None:
    recording = recorded(ThreeAnswers, guidance_scale=6.0, image_guidance_scale=1.25)
    report, found = recording.guidance, errors(recording)
    assert found["guided, each answer"] <= 1e-6 and found["guided, combined"] <= 1e-5
    assert recording.further == 2 and report.off_argument == ("guidance_scale", 1.0)
    weighing = report.weighing
    assert weighing is not None and weighing.order == (1, 2, 0) and weighing.scales == (6.0, 1.25)
    assert report.pictures == ("the item's picture", "zeros in the place of the picture (hidden_states)")
    assert "scales 6 (guidance_scale), 1.25 (image_guidance_scale)" in report.describe()
    (alone, neither) = recording.negative_each(guided_items())[0]
    assert bool(alone.arguments()["hidden_states"].any()) and not bool(neither.arguments()["hidden_states"].any())


def test_a_scale_for_each_place() -> None:
    recording = recorded(PlacedPictures, "dropped", max_guidance_scale=2.5)
    report, found = recording.guidance, errors(recording)
    assert found["guided, each answer"] <= 1e-6 and found["guided, combined"] <= 1e-5
    assert report.off_argument == ("max_guidance_scale", 1.0) and report.linear
    weighing = report.weighing
    assert weighing is not None and weighing.axis == 2 and weighing.places == (1.0, 1.5, 2.0, 2.5)
    assert "a scale for each of 4 places along axis 2, 1 to 2.5" in report.describe()


def test_the_proof_fails_with_another_items_negative() -> None:
    recording = recorded()
    items = recording.invocation.item, recording.invocation.other
    wrong = replace(recording, marked=recording.marked)

    def exchanged(asked: list[Any], seed: int = 0) -> list[tuple[Conditioning, ...]]:
        swapped = [items[1] if item == items[0] else items[0] for item in asked]
        pairs = zip(recording.guided_each(asked, seed), recording.guided_each(swapped, seed), strict=True)
        return [(own[0], *others[1:]) for own, others in pairs]

    object.__setattr__(wrong, "guided_each", exchanged)
    with pytest.raises(RecordingError, match="failed its proof: guided"):
        wrong.prove()


def test_a_negative_prompt_of_the_items_own_is_heard() -> None:
    items = [{**item, "negative_prompt": word} for item, word in zip(guided_items(), ("dull", "grey"), strict=True)]
    recording = record(guided_pictures(), items=items)
    errors(recording)
    away = [answers[0].arguments()["text"] for answers in recording.negative_each(items)]
    assert not torch.equal(*away)


def test_answers_that_are_weighed_in_an_unknown_way_are_refused() -> None:
    with pytest.raises(RecordingError, match="asks its network for 3 answers and weighs them in a way that is not"):
        recorded(ThreeAnswers, "odd")


def test_a_pipeline_that_is_not_guided_has_no_further_answers() -> None:
    recording = recorded(guidance_scale=1.0)
    assert recording.further == 1 and recording.guidance.argument_scale == 1.0  # off as it was given, and it can be on


# --- the fit itself ---------------------------------------------------------------------------------------------------


def run(values: dict[str, float], coefficients: tuple[float, ...], dtype: torch.dtype = torch.float32) -> GuidedRun:
    said = list(torch.randn(len(coefficients), 2, 3, 4, generator=torch.Generator().manual_seed(0)))
    target = sum(c * answer for c, answer in zip(coefficients, said, strict=True))
    return GuidedRun(values, [one.to(dtype) for one in said], target.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_told_from_an_argument_by_several_runs(dtype: torch.dtype) -> None:
    given = [run({"a": a, "b": b}, (1 - a, a), dtype) for a, b in ((3.0, 3.0), (4.0, 3.5), (5.5, 2.0))]
    found = weigh(given, positive=1)
    assert found is not None and found.order == (1, 0) and found.follows == (("a", 0.0),) and found.scales == (3.0,)
    fixed = [run({"a": a}, (-2.0, 3.0), dtype) for a in (3.0, 4.0, 5.5)]
    found = weigh(fixed, positive=1)
    assert found is not None and found.follows == (None,)
    assert found.scales == pytest.approx((3.0,), rel=1e-2)


def test_sums_that_are_none_are_not_taken_for_one() -> None:
    odd = [run({"a": a}, (1 - a, a)) for a in (3.0, 4.0)]
    squared = [replace(one, target=one.target.square()) for one in odd]
    assert weigh(squared, positive=1) is None
    three = [run({"a": a, "b": b}, (b - a, a, 1.1 - b)) for a, b in ((3.0, 2.0), (4.0, 2.5))]
    assert weigh(three, positive=1) is None
