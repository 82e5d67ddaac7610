"""Pictures with holes, by a seed: what the embedded inpainting teacher is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline

from fewstep.conditioning.item import Item
from fewstep.data.items import read_items
from fewstep.errors import UserError
from fewstep.fashion import PROMPTS, held_back_images, training_images
from fewstep.fashion.holes import CELL, SIDE, hole
from fewstep.fashion.items import inpainting_items, main, write_items


def given(item: Item) -> tuple[np.ndarray, np.ndarray]:
    """The picture and the mask of an item, (32, 32)."""
    return np.asarray(item.arguments["image"].convert("L")), np.asarray(item.arguments["mask_image"])


def test_a_hole_is_a_half_or_a_rectangle_of_whole_cells() -> None:
    holes = torch.stack([hole(0, index) for index in range(300)])
    cells = holes[:, ::CELL, ::CELL]
    assert torch.equal(cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2), holes)
    areas = holes.flatten(1).float().mean(1)
    assert areas.min() >= 0.39 and areas.max() <= 0.77 and 0.5 < areas.mean() < 0.58
    halves = set()
    for one in cells:
        (rows,), (columns,) = (torch.where(one.any(axis)) for axis in (1, 0))
        assert one.sum() == len(rows) * len(columns), "it has one piece, and no hole of its own"
        assert bool(one.all()) is False
        if one.sum() == (SIDE // CELL) ** 2 // 2 and SIDE // CELL in (len(rows), len(columns)):
            halves.add((int(rows[0]), int(columns[0]), len(rows)))
    assert len(halves) == 4
    assert len({one.numpy().tobytes() for one in holes}) > 30


def test_a_hole_depends_on_its_two_numbers() -> None:
    assert torch.equal(hole(3, 7), hole(3, 7))
    assert any(not torch.equal(hole(3, index), hole(4, index)) for index in range(3))


def test_the_images_that_trained_nothing_are_other_images() -> None:
    images, labels = held_back_images()
    assert images.dtype == torch.uint8 and images.shape == (5000, 1, 32, 32)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [500] * 10
    held, trained = ({one.numpy().tobytes() for one in some} for some in (images, training_images()[0]))
    assert len(held & trained) < 5  # a few clothes are in the data set twice


def test_items_are_balanced_and_depend_on_seed_and_number_alone() -> None:
    few, many = inpainting_items(25, seed=3), inpainting_items(60, seed=3)
    assert [item.key for item in few] == [item.key for item in many[:25]]
    assert [item.subject for item in few[:10]] == list(PROMPTS)
    assert len({item.key for item in many}) == 60
    assert not {item.key for item in many} & {item.key for item in inpainting_items(60, seed=4)}
    images, labels = held_back_images()
    for index, item in enumerate(few):
        row = int(item.name.split()[-1])
        picture, mask = given(item)
        assert np.array_equal(picture, images[row, 0]) and labels[row] == index % 10
        assert np.array_equal(mask == 255, hole(3, index)) and set(np.unique(mask)) == {0, 255}
        assert item.arguments["image"].mode == "RGB" and item.arguments["mask_image"].mode == "L"


def test_no_picture_comes_twice_before_all_have_been() -> None:
    every = inpainting_items(5010)
    items, again = every[:5000], every[5000:]
    assert len({item.name for item in items}) == 5000
    assert [item.name for item in again] == [item.name for item in items[:10]]
    assert not {item.key for item in again} & {item.key for item in items}, "with other holes"


def test_items_of_training_pictures_show_none_that_was_held_back() -> None:
    images, _ = training_images()
    items = inpainting_items(10, pictures="training")
    assert all(np.array_equal(given(item)[0], images[int(item.name.split()[-1]), 0]) for item in items)
    assert not {item.key for item in items} & {item.key for item in inpainting_items(10)}


def test_an_items_file_is_read_as_the_same_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a"), "--count", "12", "--seed", "5", "--pictures", "training"]) == 0
    path = Path(capsys.readouterr().out.strip())
    read = read_items(path, StableDiffusionInpaintPipeline)
    for one, item in zip(read.each, inpainting_items(12, 5, "training"), strict=True):
        assert {*one.arguments, "target"} == set(item.arguments)  # which read_items keeps apart
        assert one.arguments["prompt"] == item.arguments["prompt"]
        for name in ("image", "mask_image"):  # in colour, as pictures are read, and three channels of the same
            shown = np.asarray(one.arguments[name].convert("L"))
            assert np.array_equal(shown, np.asarray(item.arguments[name].convert("L")))


def test_what_cannot_be_asked_for_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--count", "0"]) == 2
    assert capsys.readouterr().err == "error: at least one item has to be asked for, not 0\n"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_items(tmp_path / "file", 1)
