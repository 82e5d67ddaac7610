"""What one sample is conditioned on: equal by content, pictures known by value, and said in words."""

import numpy as np
import PIL.Image
import pytest
import torch

from fewstep.conditioning.item import Item, digest, holds_picture


def picture(value, size=(4, 6), mode="RGB"):
    return PIL.Image.new(mode, size, value)


def test_items_are_equal_where_their_content_is():
    one = Item({"prompt": "a cat", "image": picture("red")}, name="row 1")
    assert one == Item({"image": picture("red"), "prompt": "a cat"}, name="row 7")
    assert len({one, Item({"prompt": "a cat", "image": picture("red")})}) == 1
    for other in (
        {"prompt": "a cat", "image": picture("blue")},
        {"prompt": "a dog", "image": picture("red")},
        {"prompt": "a cat", "last_image": picture("red")},
        {"prompt": "a cat", "image": [picture("red")]},
        {"prompt": "a cat", "image": picture("red", size=(6, 4))},
    ):
        assert one != Item(other)
    assert Item({"prompt": "a cat"}, key="k") == Item({"prompt": "a dog"}, key="k")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (torch.zeros(2), np.zeros(2, np.float32)),
        (["ab", "c"], ["a", "bc"]),
        ([[1], [2]], [[1, 2]]),
        ("1", 1),
        ({"a": 1}, {"a": 2}),
    ],
)
def test_no_two_values_read_alike(one, other):
    assert digest({"x": one}) == digest({"x": one})
    assert digest({"x": one}) != digest({"x": other})


def test_pictures_are_known_by_value():
    clip = [picture("red"), picture("blue")]
    item = Item({"prompt": "a cat", "conditions": clip, "pose": torch.zeros(3, 4, 6), "height": 8})
    assert set(item.pictures) == {"conditions", "pose"}
    assert not holds_picture([0.5, 0.5])
    assert item.forms == {
        "prompt": "text",
        "conditions": "list of 2: picture RGB 4x6",
        "pose": "tensor [3, 4, 6]",
        "height": "int",
    }


def test_an_item_is_named_in_messages():
    assert str(Item({"prompt": "a cat"}, name="row 3 of items.jsonl")) == "row 3 of items.jsonl"
    assert str(Item({"prompt": "a cat"})) == "'a cat'"
    without = Item({"image": picture("red")})
    assert without.subject is None
    assert without.key[:8] in str(without)


def test_a_value_that_no_item_holds_is_refused():
    with pytest.raises(TypeError, match="not function"):
        Item({"prompt": lambda: "a cat"})
