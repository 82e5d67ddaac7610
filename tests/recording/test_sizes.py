"""Items whose samples are of several sizes: the rules are learnt and proven at each, or the items are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from picture_pipeline import items_of, picture, picture_pipeline

from fewstep.conditioning.item import Item
from fewstep.recording import Recipe, Recording, RecordingError, record
from fewstep.recording import sizes as module
from fewstep.recording.sizes import with_mirrored, with_sizes


def two_sizes(way: str, large: int = 2) -> list[Item]:
    """Three items of 4x4, and some of 6x4."""
    items = items_of(way, 3 + large)
    for number in range(3, 3 + large):
        items[number]["image"] = picture(number, 6)
    return [Item(item, f"row {number}") for number, item in enumerate(items, 1)]


def recorded(way: str, items: list[Item]) -> Recording:
    return record(picture_pipeline(way), items=items[:2])


@pytest.mark.parametrize("way", ["channels_before", "drawn", "list", "argument"])
def test_each_size_is_proven_with_a_picture_that_it_was_not_learnt_from(way: str) -> None:
    large = 2 if way == "drawn" else 1  # one alone is mirrored
    items = two_sizes(way, large)
    recording = with_sizes(recorded(way, items), items)
    (other,) = recording.sizes
    assert (recording.sample_shape, other.sample_shape) == ((3, 4, 4), (3, 6, 4))
    assert isinstance(other, Recording) and other.proof is not None
    assert other.proof.swapped is not None and other.proof.swapped > 1e-3
    assert [recording.for_item(item) is other for item in items] == [False] * 3 + [True] * large
    told = recording.condition_each(items=items)
    for conditioning, shape in zip(told, [(3, 4, 4)] * 3 + [(3, 6, 4)] * large, strict=True):
        x, t = torch.zeros(1, *shape), torch.tensor([500.0], dtype=torch.float64)
        assert recording.recipe.call(recording.network, x, t, conditioning).shape == x.shape
    assert Recipe.from_json(recording.recipe.to_json()) == recording.recipe
    with pytest.raises(RecordingError, match="row 9 is of a size that was not among those"):
        recording.condition_each(items=[Item({**items[0].arguments, "image": picture(0, 8)}, "row 9")])


def test_the_recording_of_one_expert_has_its_name_at_every_size() -> None:
    items = two_sizes("channels")
    recording = with_sizes(recorded("channels", items), items)
    alone = recording.of(replace(recording.experts[0], component="transformer_2"))
    recipes = [alone.recipe, *alone.recipe.sizes, *(one.recipe for one in alone.sizes)]
    assert [recipe.component for recipe in recipes] == ["transformer_2"] * 3


def test_items_of_one_size_are_not_run_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item(item) for item in items_of("channels", 3)]
    recording = recorded("channels", items)
    monkeypatch.setattr(module, "_first_step", lambda *_: pytest.fail("there is one form"))
    assert with_sizes(recording, items) is recording


def test_another_number_of_references_is_no_other_size() -> None:
    items = [Item(item) for item in items_of("several_of_one", 3)]
    more = Item({**items[0].arguments, "image": [picture(7), picture(8), picture(9)]})
    recording = with_sizes(recorded("several_of_one", items), [*items, more])
    assert recording.sizes == () and {item.form for item in (*items, more)} == recording.keys
    told = recording.condition_each(items=[more])
    x, t = torch.zeros(1, *recording.sample_shape), torch.tensor([500.0], dtype=torch.float64)
    assert recording.recipe.call(recording.network, x, t, told[0]).shape == x.shape


def test_a_grid_that_follows_the_size_is_refused_and_the_columns_named() -> None:
    items = two_sizes("channels")
    pipeline = picture_pipeline("channels")
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(RecordingError, match=r"row 4 has samples of another size than row 1, .*grid of times.*image"):
        with_sizes(record(pipeline, items=items[:2]), items)


def test_too_many_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    items = two_sizes("channels")
    monkeypatch.setattr(module, "MOST", 1)
    with pytest.raises(RecordingError, match=r"of more than 1 sizes.*bring their pictures to a few sizes"):
        with_sizes(recorded("channels", items), items)


def test_a_mirrored_item_has_other_pictures_of_the_same_form() -> None:
    for item in items_of("several_of_one", 1)[0], {"image": torch.ones(3, 4, 4)}, {"image": torch.rand(3, 4, 4)}:
        mirrored = with_mirrored(Item(item))
        assert mirrored != Item(item) and mirrored.form == Item(item).form
