"""Many conditionings in few tensors: what goes in comes out, in memory and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.conditioning.conditioning import Conditioning, Leaf, SampleList
from fewstep.conditioning.stacking import Stack, from_json, in_memory, one_of_each_kind, stack, to_json

IDS = torch.arange(6.0).view(3, 2)


def item(number: int) -> Conditioning:
    """Everything that occurs: two lengths, nested and shared values, lists of ragged tensors, odd dtypes, none."""
    length = 2 + number % 2
    tree = {
        "text": Leaf(torch.full((1, length, 4), float(number)), 1),
        "half": Leaf(torch.full((3, 2), number, dtype=torch.bfloat16), 3),
        "mask": Leaf(torch.ones(1, length, dtype=torch.bool), 1),
        "ids": Leaf(IDS.clone()),
        "rotary": (Leaf(torch.complex(IDS, IDS)), Leaf(None)),
        "ragged": SampleList((torch.full((number % 3 + 1, 2), float(number)),), 1),
        "shapes": SampleList(([(1, number, 2)],), 1),
        "scale": Leaf(1.5),
        "scalar": Leaf(torch.tensor(float(number))),
    }
    return Conditioning(tree, 1)


def same(a: Conditioning, b: Conditioning) -> bool:
    tensors: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for found, one in zip(tensors, (a, b), strict=True):
        one.map_tensors(lambda tensor, found=found: found.append(tensor) or tensor)
    return a.describe() == b.describe() and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*tensors, strict=True)
    )


def test_items_come_out_as_they_went_in() -> None:
    items = [item(number) for number in range(12)]
    held = in_memory(items)
    assert len(held) == 12
    for number, one in enumerate(items):
        assert same(held[number], one)
        assert held[number].arguments()["shapes"] == one.arguments()["shapes"]


def test_a_file_gives_them_out_one_by_one(tmp_path: Path) -> None:
    items = [item(number) for number in range(7)]
    groups, tensors = stack(items)
    save_file(tensors, tmp_path / "pack.safetensors", {"groups": to_json(groups)})
    file = safe_open(str(tmp_path / "pack.safetensors"), framework="pt")
    held = Stack(
        from_json(file.metadata()["groups"]),
        file.get_tensor,
        lambda name, row: file.get_slice(name)[row : row + 1][0],
    )
    assert all(same(held[number], one) for number, one in enumerate(items))


def test_what_all_items_share_is_kept_once() -> None:
    items = [Conditioning({"text": Leaf(torch.randn(1, 4), 1), "ids": Leaf(torch.ones(1000))}, 1) for _ in range(50)]
    groups, tensors = stack(items)
    assert len(groups) == 1 and sorted(tensor.numel() for tensor in tensors.values()) == [200, 1000]


def test_one_item_of_each_kind_over_several_packs() -> None:
    def text(length: int) -> Conditioning:
        return Conditioning({"text": Leaf(torch.randn(1, length), 1)}, 1)

    stacks = [in_memory([text(2), text(3), text(2)]), in_memory([text(3), text(4), text(2)])]
    assert one_of_each_kind(stacks, 3) == [0, 1, 4]


def test_items_are_single_samples() -> None:
    with pytest.raises(ValueError, match="item 1 holds 2 samples"):
        stack([Conditioning({}, 1), Conditioning({}, 2)])


def test_changing_an_item_does_not_change_the_pack() -> None:
    held = in_memory([item(1), item(3)])
    held[0].arguments()["ids"].zero_()
    assert torch.equal(held[1].arguments()["ids"], IDS) and torch.equal(held[0].arguments()["ids"], IDS)
