"""Items: read from a file, looked at once, opened when they are asked for, and refused where a row cannot be meant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxFillPipeline,
    HunyuanVideoImageToVideoPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableVideoDiffusionPipeline,
    WanImageToVideoPipeline,
    WanVACEPipeline,
)
from PIL import Image

from fewstep.conditioning.item import Item
from fewstep.data import item_pictures
from fewstep.data.items import read_items
from fewstep.errors import UserError

EDIT, FILL = StableDiffusionInstructPix2PixPipeline, StableDiffusionInpaintPipeline


def pixels(seed: int, size: tuple[int, int] = (8, 6), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (size[1], size[0], channels), dtype=np.uint8).squeeze()


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6), **more: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path, **more)
    return path.name


def table(folder: Path, *rows: Any, name: str = "items.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def edits(folder: Path, count: int = 2) -> Path:
    for number in range(count):
        picture(folder / f"{number}.png", number)
    return table(folder, *({"prompt": f"p {number}", "image": f"{number}.png"} for number in range(count)))


# --- what is read -------------------------------------------------------------------------------------------------


def test_a_row_is_a_prompt_and_pictures_whose_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch) -> None:
    items = read_items(edits(tmp_path), EDIT)
    monkeypatch.chdir("/")
    assert [item.subject for item in items.each] == ["p 0", "p 1"]
    assert [item.name for item in items.each] == ["row 1 of items.jsonl", "row 2 of items.jsonl"]
    for number, item in enumerate(items.each):
        assert np.array_equal(np.asarray(item.arguments["image"]), pixels(number)), "a pixel was lost"
    assert [file.name for file in items.files] == ["0.png", "1.png"]


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    edits(tmp_path)
    assert read_items(tmp_path, EDIT).keys == read_items(tmp_path / "items.jsonl", EDIT).keys


def test_pictures_are_upright_and_rgb_and_masks_are_grey(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(tmp_path / "turned.png", 1, (8, 6), exif=turned)
    Image.fromarray(pixels(2, (6, 8), 1)).save(tmp_path / "grey.png")
    picture(tmp_path / "mask.png", 3, (6, 8))
    rows = [{"prompt": "", "image": name, "mask_image": "mask.png"} for name in ("turned.png", "grey.png")]
    one, two = (item.arguments for item in read_items(table(tmp_path, *rows), FILL).each)
    assert (one["image"].mode, one["image"].size) == ("RGB", (6, 8))
    assert np.array_equal(np.asarray(one["image"]), np.rot90(pixels(1), -1))
    assert (two["image"].mode, one["mask_image"].mode) == ("RGB", "L")


def test_a_list_is_several_references_and_a_folder_the_frames_of_a_clip_in_name_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        picture(tmp_path / "clip" / f"{number}.png", number)
    (tmp_path / "clip" / ".hidden.png").write_bytes(b"")
    edits(tmp_path)
    rows = [{"prompt": "a", "image": ["0.png", "1.png"]}, {"prompt": "b", "image": ["0.png"]}]
    references = read_items(table(tmp_path, *rows), QwenImageEditPlusPipeline)
    assert [len(item.arguments["image"]) for item in references.each] == [2, 1]
    clip = read_items(table(tmp_path, {"prompt": "a", "video": "clip"}), WanVACEPipeline).each[0].arguments["video"]
    assert [np.array_equal(np.asarray(frame), pixels(number)) for number, frame in enumerate(clip)] == [True] * 3


def test_parquet_holds_pictures_as_paths_bytes_or_as_datasets_writes_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    edits(tmp_path)
    held = [(tmp_path / f"{number}.png").read_bytes() for number in (0, 1)]
    expected = read_items(tmp_path, EDIT)
    for column in (
        ["0.png", "1.png"],
        held,
        [{"bytes": content, "path": "of another machine"} for content in held],
        [{"bytes": None, "path": path} for path in ("0.png", "1.png")],
    ):
        content = pyarrow.table({"prompt": ["p 0", "p 1"], "image": column, "negative_prompt": [None, None]})
        parquet.write_table(content, tmp_path / "items.parquet", row_group_size=1)
        items = read_items(tmp_path / "items.parquet", EDIT)
        assert items.keys == expected.keys and items.each[1].name == "row 2 of items.parquet"
        assert np.array_equal(np.asarray(items.each[1].arguments["image"]), pixels(1))
    lists = pyarrow.table({"prompt": ["a"], "image": [held]})
    parquet.write_table(lists, tmp_path / "items.parquet")
    (several,) = read_items(tmp_path / "items.parquet", QwenImageEditPlusPipeline).each
    assert [np.array_equal(np.asarray(p), pixels(n)) for n, p in enumerate(several.arguments["image"])] == [True] * 2


def test_the_rows_of_the_page_are_items(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text(encoding="utf-8")
    rows = page.split("```json\n")[1].split("```")[0]
    for number, name in enumerate(json.loads(row)["image"] for row in rows.splitlines()):
        picture(tmp_path / name, number)
    (tmp_path / "items.jsonl").write_text(rows)
    assert len(read_items(tmp_path, EDIT)) == 2


def test_from_python_they_are_pictures_tensors_or_paths(tmp_path: Path) -> None:
    edits(tmp_path)
    given = [
        {"prompt": "a", "image": Image.fromarray(pixels(0))},
        {"prompt": "b", "image": torch.rand(1, 3, 6, 8)},
        {"prompt": "c", "image": tmp_path / "0.png"},
        Item({"prompt": "d", "image": Image.fromarray(pixels(0, channels=1))}, name="mine"),
    ]
    items = read_items(given, EDIT).each
    assert [item.name for item in items] == ["item 1", "item 2", "item 3", "mine"]
    assert items[1].arguments["image"] is given[1]["image"] and items[3].arguments["image"].mode == "RGB"
    assert items[0].form == items[2].form


@pytest.mark.parametrize("pipeline", [FluxFillPipeline, FILL, WanImageToVideoPipeline, StableVideoDiffusionPipeline])
def test_a_text_under_an_argument_that_takes_none_is_a_path(tmp_path: Path, pipeline: type) -> None:
    """Also where the pipeline says tensor, and means a picture."""
    picture(tmp_path / "0.png")
    row = {"image": "0.png"} if pipeline is StableVideoDiffusionPipeline else {"image": "0.png", "prompt": "0.png"}
    (item,) = read_items(table(tmp_path, row), pipeline).each
    assert isinstance(item.arguments["image"], Image.Image) and item.subject == row.get("prompt")


def test_what_else_is_a_samples_own_stays_as_it_is(tmp_path: Path) -> None:
    edits(tmp_path)
    row = {"prompt": "a", "image": "0.png", "negative_prompt": "b", "height": 16, "width": 24, "last_image": None}
    (item,) = read_items(table(tmp_path, row), WanImageToVideoPipeline).each
    assert {**item.arguments, "image": 0, "last_image": None} == {**row, "image": 0}


# --- what tells them apart ----------------------------------------------------------------------------------------


def test_the_key_is_of_the_row_and_of_the_files_content(tmp_path: Path) -> None:
    file = edits(tmp_path)
    keys = read_items(file, EDIT).keys
    (tmp_path / "0.png").rename(tmp_path / "moved.png")
    table(tmp_path, {"image": "moved.png", "prompt": "p 0"}, {"prompt": "p 1", "image": "1.png"})
    assert read_items(file, EDIT).keys == keys, "a name is no content"
    picture(tmp_path / "moved.png", 9)
    assert [a == b for a, b in zip(read_items(file, EDIT).keys, keys)] == [False, True]
    table(tmp_path, {"image": "moved.png", "prompt": "other"}, {"prompt": "p 1", "image": "1.png"})
    assert len({*keys, *read_items(file, EDIT).keys}) == 3


def test_two_are_of_one_form_and_differ_in_as_much_as_they_can(tmp_path: Path) -> None:
    for name, seed, size in (("a", 0, (8, 6)), ("b", 1, (6, 8)), ("c", 2, (8, 6)), ("d", 3, (8, 6))):
        picture(tmp_path / f"{name}.png", seed, size)
    pairs = [("a", "x"), ("b", "y"), ("c", "x"), ("d", "y")]
    items = read_items(table(tmp_path, *({"image": f"{i}.png", "prompt": p} for i, p in pairs)), EDIT)
    assert [item.name for item in items.two()] == ["row 1 of items.jsonl", "row 4 of items.jsonl"]


def test_they_are_not_in_memory_and_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch) -> None:
    items = read_items(edits(tmp_path, 40), EDIT)
    item_pictures._opened.cache_clear()
    for item in items.each:
        _ = item.arguments["image"]
    assert item_pictures._opened.cache_info().currsize <= 8
    picture(tmp_path / "0.png", 99)
    with pytest.raises(UserError, match=r"0\.png has changed since the items were read"):
        _ = items.each[0].arguments["image"]
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png cannot be read any more"):
        _ = items.each[1].arguments["image"]


# --- what is refused ----------------------------------------------------------------------------------------------


def _animation(folder: Path) -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in (0, 1)]
    frames[0].save(folder / "0.png", save_all=True, append_images=frames[1:])


def _truncated(folder: Path) -> None:
    content = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "0.png").unlink(), "there is no file"),
        (_truncated, "is no picture that can be read"),
        (lambda folder: (folder / "0.png").write_text("a text"), "is no picture that can be read"),
        (_animation, "is an animation"),
    ],
)
def test_a_picture_that_cannot_be_read_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    file = edits(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=rf"^row 1 of items\.jsonl: image: .*0\.png.*{words}|{words} .*0\.png"):
        read_items(file, EDIT)


@pytest.mark.parametrize(
    "pipeline, row, words",
    [
        (EDIT, {"prompt": "a", "image": "0.png", "style": "b"}, "has the column style, .* takes no such argument"),
        (EDIT, {"prompt": "a", "image": "0.png", "guidance_scale": 3}, "guidance_scale is the same for all items"),
        (EDIT, {"prompt": "a", "image": "0.png", "num_inference_steps": 3}, "num_inference_steps is the same"),
        (EDIT, {"image": "0.png"}, "has no prompt, and StableDiffusionInstructPix2PixPipeline needs it"),
        (WanImageToVideoPipeline, {"prompt": "a"}, "has no image, and WanImageToVideoPipeline needs it"),
        (EDIT, {"prompt": 3, "image": "0.png"}, "its prompt is no text"),
        (EDIT, {"prompt": "a", "image": 3}, "image: a picture is a path or a list of paths, not 3"),
        (EDIT, {"prompt": "a", "image": []}, "image: the list is empty"),
        (
            EDIT,
            {"prompt": "a", "image": [["0.png"], ["wide.png"]]},
            "image: it is a list of lists; several pictures are",
        ),
        (EDIT, {"prompt": "a", "image": "empty"}, "image: the folder .*empty holds no picture"),
        (EDIT, [1, 2], "is no JSON table"),
        (EDIT, '{"prompt": "a", "image": ', "is no JSON: "),
        (EDIT, '{"prompt": "a", "prompt": "b"}', "is no JSON: 'prompt' is there twice"),
        (HunyuanVideoImageToVideoPipeline, {"prompt": "a", "image": ["0.png"]}, "takes one picture, not a list"),
        (WanVACEPipeline, {"prompt": "a", "video": "0.png"}, "takes a list of pictures, or a folder of frames"),
        (FILL, {"prompt": "a", "image": "0.png", "mask_image": "black.png"}, "mask_image is all black"),
        (FILL, {"prompt": "a", "image": "0.png", "mask_image": "wide.png"}, "mask_image has 9x6 pixels, and image 8x6"),
        (FILL, {"prompt": "a", "image": "0.png", "mask_image": "none.png"}, "there is no file .*none.png"),
        (WanVACEPipeline, {"prompt": "a", "video": "clip", "mask": ["0.png"] * 3}, "unequal lengths|mask has"),
    ],
)
def test_a_row_that_cannot_be_meant_is_refused(tmp_path: Path, pipeline: type, row: Any, words: str) -> None:
    picture(tmp_path / "0.png")
    picture(tmp_path / "wide.png", 0, (9, 6))
    Image.new("RGB", (8, 6)).save(tmp_path / "black.png")
    (tmp_path / "empty").mkdir()
    for number in (0, 1):
        picture(tmp_path / "clip" / f"{number}.png", number, (4, 4))
    with pytest.raises(UserError, match=rf"^row 2 of items\.jsonl.*({words})") as refused:
        read_items(table(tmp_path, "", row), pipeline)
    assert "\n" not in str(refused.value)


def test_rows_of_pictures_with_an_empty_place_are_refused() -> None:
    """VisualCloze is shown examples in rows, and None where its own picture is to be."""

    class Rows:
        def __call__(self, prompt: str = "", image: torch.FloatTensor | None = None) -> None:
            """Its type says nothing of lists of pictures."""

    shown = [[Image.new("RGB", (8, 6)), None]]
    with pytest.raises(UserError, match=r"^item 1: image has an empty place among its pictures; several pictures are"):
        read_items([{"prompt": "a", "image": shown}], Rows)


@pytest.mark.parametrize(
    "pipeline, rows, words",
    [
        (
            EDIT,
            [{"image": "0.png"}, {"image": "0.png", "negative_prompt": "b"}],
            "row 2 .* has negative_prompt",
        ),
        (FILL, [{"image": "0.png", "mask_image": "0.png"}, {"image": "0.png"}], "row 2 .* has no mask_image, unlike"),
        (
            WanVACEPipeline,
            [{"video": "two"}, {"video": "three"}],
            "row 2 .* has 3 frames, and that of row 1 .* 2",
        ),
    ],
)
def test_rows_that_do_not_belong_together_are_refused(tmp_path: Path, pipeline: type, rows: Any, words: str) -> None:
    picture(tmp_path / "0.png")
    for folder, count in (("two", 2), ("three", 3)):
        for number in range(count):
            picture(tmp_path / folder / f"{number}.png", number)
    with pytest.raises(UserError, match=words):
        read_items(table(tmp_path, *({"prompt": "a", **row} for row in rows)), pipeline)


def test_a_result_is_looked_at_though_there_is_a_cache_of_the_items(tmp_path: Path) -> None:
    """A cache is made of what a network is told, and no result is."""
    edits(tmp_path)
    picture(tmp_path / "after.png", 5)
    rows = [{"prompt": "a", "image": f"{number}.png", "target": "after.png"} for number in (0, 1)]
    file = table(tmp_path, *rows)
    assert len(read_items(file, EDIT, cached=True).targets) == 2
    content = (tmp_path / "after.png").read_bytes()
    (tmp_path / "after.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^row 1 of items\.jsonl: target: .*after\.png is no picture that can be read"):
        read_items(file, EDIT, cached=True)


def test_items_none_of_which_differ_teach_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    file = table(tmp_path, *({"prompt": prompt, "image": "0.png"} for prompt in "ab"))
    with pytest.raises(UserError, match="no two rows have different pictures"):
        read_items(file, EDIT).two()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("none.jsonl", None, "there is no file"),
        ("items.csv", b"a", r"takes a \.jsonl or \.parquet file"),
        ("items.jsonl", b"\n\n", "holds no item"),
        ("items.jsonl", "é".encode("latin-1"), "is not UTF-8 text"),
        ("items.parquet", b"no table", "is no parquet file"),
    ],
)
def test_a_file_without_items_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_items(os.fspath(tmp_path / name), EDIT)
