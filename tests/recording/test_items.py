"""Teachers that are told pictures: every way in which one is told is recorded by one rule, and the proof can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from picture_pipeline import RECORDABLE, items_of, picture, picture_pipeline

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Item
from fewstep.recording import Recipe, Recording, RecordingError, record


def recorded(way: str, **call: Any) -> Recording:
    return record(picture_pipeline(way), items=items_of(way), **call)


def refused(way: str, items: Any, **call: Any) -> str:
    with pytest.raises(RecordingError) as caught:
        record(picture_pipeline(way), items=items, **call)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", RECORDABLE)
def test_every_way_is_recorded_and_proven(way: str) -> None:
    recording = recorded(way)
    proof = recording.prove()
    errors = {check.name: check.error for check in proof.checks}
    assert errors["unguided, one sample"] <= 1e-6 and errors["unguided, another item and draw"] <= 1e-6
    assert errors["unguided, two items in one call"] <= 5e-6
    assert proof.swapped is not None and proof.swapped >= 1e-3
    assert not proof.warnings and not proof.shaken
    assert recording.conditional == "item" and recording.call == {} and "image" in recording.inputs
    assert Recipe.from_json(recording.recipe.to_json()) == recording.recipe
    assert recording.told is not None and bool(recording.told.draws) == (way in ("drawn", "global_draw"))
    assert (recording.told.start > 0) == (way == "trace")
    assert any(text.startswith("the first sample") for text in recording.told.describe()) == (way == "trace")
    share = {"frame_mixed_in": 0.75, "frames_scattered": 0.5}.get(way, 0.75 if way.startswith("pinned_clean") else 1.0)
    assert recording.recipe.read.float().mean().item() == share


@pytest.mark.parametrize("way", ["channels", "tokens_behind", "frame_not_stepped", "two_rows"])
def test_the_proof_fails_with_another_items_picture(way: str) -> None:
    recording = recorded(way)
    items = recording.invocation.item, recording.invocation.other
    wrong = replace(recording, marked=recording.marked)

    def exchanged(asked: Sequence[Item], seed: int = 0) -> list[Conditioning]:
        return recording.draw_each([items[1] if item == items[0] else items[0] for item in asked], seed)

    object.__setattr__(wrong, "condition_each", lambda items: exchanged(items))
    object.__setattr__(wrong, "draw_each", exchanged)
    with pytest.raises(RecordingError, match="failed its proof"):
        wrong.prove()


def test_a_batch_is_of_its_own_items() -> None:
    recording = recorded("channels")
    items = [Item(item) for item in items_of("channels", 4)]
    each = recording.condition_each(items=items)
    both = recording.condition(items=items)
    x = torch.randn(1, *recording.sample_shape).expand(4, -1, -1, -1)
    at = torch.full((4,), 500.0, dtype=torch.float64)
    recording.network.requires_grad_(False)
    together = recording.recipe.call(recording.network, x, at, both)
    for k, one in enumerate(each):
        alone = recording.recipe.call(recording.network, x[:1], at[:1], one)
        torch.testing.assert_close(together[k : k + 1], alone, rtol=0, atol=1e-6)
        others = [float((together[j] - alone).abs().max()) for j in range(4) if j != k]
        assert min(others) > 1e-3


def test_items_with_other_numbers_of_references_are_groups() -> None:
    recording = recorded("several_of_one")
    one, two = recording.condition_each(items=items_of("several_of_one"))
    assert Conditioning.compatible(one, two)
    three = {"prompt": "c boat", "image": [picture(7), picture(8), picture(9)]}
    (longer,) = recording.condition_each(items=[three])
    assert not Conditioning.compatible(one, longer)
    with pytest.raises(RecordingError, match="cannot form one batch"):
        recording.condition(items=[items_of("several_of_one")[0], three])
    x, at = torch.randn(1, *recording.sample_shape), torch.tensor([500.0], dtype=torch.float64)
    assert recording.recipe.call(recording.network, x, at, longer).shape == x.shape


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_items_of_other_sizes_alone_are_marked_rightly(counts: tuple[int, int]) -> None:
    """They form no batch to try the marks with, and two of the same size do."""
    shown = [[picture(10 * k + n) for n in range(counts[k % 2])] for k in range(4)]
    items = [{"prompt": f"{'abcd'[k]} boat", "image": shown[k]} for k in range(4)]
    recording = record(picture_pipeline("several_of_one"), items=items[:2])
    recording.prove()
    x, at = torch.randn(2, *recording.sample_shape), torch.full((2,), 500.0, dtype=torch.float64)
    for own in (items[::2], items[1::2]):
        each = recording.condition_each(items=own)
        with torch.no_grad():
            both = recording.recipe.call(recording.network, x, at, recording.condition(items=own))
            alone = [recording.recipe.call(recording.network, x[k : k + 1], at[:1], each[k]) for k in range(2)]
        torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-6)


def test_drawn_constants_follow_the_seed() -> None:
    recording = recorded("drawn")
    (item,) = items_of("drawn", 1)
    first, again, other = (recording.draw_each([item], seed)[0] for seed in (0, 0, 1))
    told = [conditioning.arguments()["hidden_states"] for conditioning in (first, again, other)]
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])


def test_an_item_whose_picture_lies_elsewhere_is_refused_by_name() -> None:
    """The rules put noise in the place of its picture: a run would train on no picture of it at all, and be silent."""
    third = {"prompt": "c boat", "image": picture(7)}
    one, two = ({**item, "place": 0} for item in items_of("frame_mixed_in"))
    recording = record(picture_pipeline("frame_mixed_in"), items=[one, two])
    recording.prove()
    words = r"item 0: hidden_states of network holds the sample in other places .* need a run of their own"
    with pytest.raises(RecordingError, match=words):
        recording.condition_each(items=[{**third, "place": 2}])
    with pytest.raises(RecordingError, match=words.replace("item 0", "item 1")):
        record(picture_pipeline("frame_mixed_in"), items=[one, {**two, "place": 2}])


def test_a_network_that_is_told_nothing_of_the_picture_is_refused() -> None:
    text = refused("starts", items_of("starts"))
    assert "the network of PicturePipeline is told nothing of image" in text
    assert "distil the text-to-image pipeline of the same network: its student's weights serve PicturePipeline" in text


def test_a_strength_below_one_is_recorded_at_one() -> None:
    recording = recorded("channels", strength=0.6)
    assert recording.call == {"strength": 1.0}
    recording.prove()


def test_what_is_drawn_in_every_step_is_refused_by_name() -> None:
    text = refused("redrawn", items_of("redrawn"))
    assert text.startswith("48 entries of the argument hidden_states change in every step")
    assert text.endswith("give jitter=0 in the call, which stops that")
    record(picture_pipeline("redrawn"), items=items_of("redrawn"), jitter=0.0).prove()


def test_a_picture_that_is_told_in_the_first_step_alone_is_refused() -> None:
    text = refused("kept_of_the_first", items_of("kept_of_the_first"))
    assert "network is told picture in some of its steps and not in others" in text


def test_a_network_that_is_asked_before_the_first_step_is_refused() -> None:
    text = refused("asked_before", items_of("asked_before"))
    assert "calls network before its first step, too (does it keep what it is told of a picture?)" in text


def test_a_sample_in_a_list_of_lists_is_refused() -> None:
    assert "the argument hidden_states of network changes between steps and is a list of lists" in refused(
        "nested", items_of("nested")
    )


@pytest.mark.parametrize(
    ("items", "call", "words"),
    [
        ([], {}, "no items were given"),
        ([{"prompt": "a", "image": picture(0)}], {}, "no two items differ in their pictures"),
        ([{"prompt": p, "image": picture(0)} for p in "ab"], {}, "no two items differ in their pictures"),
        ([{"prompt": "a", "image": picture(0)}, {"prompt": "b"}], {}, "item 1 and item 0 differ in which arguments"),
        ([{"prompt": "a"}, {"prompt": "b"}], {}, "item 0 holds no picture"),
        ([{"image": picture(0), "pose": picture(1)}], {}, "item 0: PicturePipeline takes no argument pose"),
        (items_of("channels"), {"image": picture(0)}, "image of PicturePipeline is given by the items and by the call"),
        (items_of("channels"), {"prompt": "a"}, "prompt of PicturePipeline is given by the items and by the call"),
        (
            [{**i, "num_inference_steps": 4} for i in items_of("channels")],
            {},
            "num_inference_steps is the same for all",
        ),
        ([{"prompt": p, "image": picture(0) + e} for p, e in (("a", 0), ("b", 1e-6))], {}, "are so much alike that"),
        ({"prompt": "a"}, {}, "items are a list"),
        (["a"], {}, "item 0 is a str; give its arguments as a dict"),
    ],
)
def test_items_that_cannot_be_meant(items: Any, call: dict[str, Any], words: str) -> None:
    assert words in refused("channels", items, **call)


def test_a_recording_of_items_wants_items() -> None:
    recording = recorded("channels")
    with pytest.raises(RecordingError, match="PicturePipeline takes items, not prompts"):
        recording.condition_each(["a boat"])
    with pytest.raises(RecordingError, match="item 0: PicturePipeline takes no argument pose"):
        recording.condition_each(items=[{"prompt": "a", "pose": picture(0)}])
