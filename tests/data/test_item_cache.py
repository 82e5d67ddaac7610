"""Items in a cache: each with its own picture and its further answers, and refused where a file has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from item_sets import picture, tiny_editor, write_items

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import with_others
from fewstep.conditioning.stacking import in_memory, stack
from fewstep.conditioning.tree import Leaf
from fewstep.data import item_pictures
from fewstep.data.condition_cache import CacheWriter, ConditionCache
from fewstep.data.conditions import Conditions
from fewstep.data.encoded_size import examples_of
from fewstep.data.encoding import CutPrompts, encode_each, encode_one, tensors_of
from fewstep.data.fingerprint import fingerprint
from fewstep.data.items import Items, read_items
from fewstep.errors import UserError
from fewstep.recording import Recording, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"), 5).parent


@pytest.fixture(scope="module")
def items(folder: Path) -> Items:
    return read_items(folder, type(tiny_editor()))


@pytest.fixture(scope="module")
def recording(items: Items) -> Recording:
    return record(tiny_editor(), items=items.two())


def write(out: Path, recording: Recording, items: Items, stop: int | None = None, **more: Any) -> Path:
    writer = CacheWriter(out, recording, "tiny", items.each, 2, more.get("resume", False), str(items.files[0].parent))
    for shard in list(writer.missing)[:stop]:
        writer.enter([writer.write(shard, list(encode_each(recording, writer.of(shard), CutPrompts())))])
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(one: Conditioning, other: Conditioning) -> bool:
    own, theirs = tensors_of(one), tensors_of(other)
    return len(own) == len(theirs) and all(torch.equal(a, b) for a, b in zip(own, theirs))


def further(told: Conditioning, number: int, same: str) -> Conditioning:
    """With two further answers, which are told the picture as ``told`` is, and another text each."""
    others = []
    for place in (1, 2):
        tree = {
            k: n if k == same else Leaf(torch.full((1, 3), float(10 * number + place)), 1) for k, n in told.tree.items()
        }
        others.append(Conditioning(tree, 1))
    return with_others(told, others)


def test_each_row_holds_its_own_items_picture(recording: Recording, items: Items, tmp_path: Path) -> None:
    cache = ConditionCache(write(tmp_path / "c", recording, items))
    assert (cache.kind, cache.items(), cache.negative()) == ("item", items.keys, None)
    cache.refuse_other_items(items)
    cache.check(recording, "tiny", first=items.each[0])
    for number, item in enumerate(items.each):
        own, other = encode_one(recording, item), encode_one(recording, items.each[number - 1])
        assert equal(cache[number], own) and not equal(cache[number], other)
    cached = Conditions(recording, items=items.each, cache=cache)
    encoded = Conditions(recording, items=items.each)
    assert equal(cached.batch(3, [0, 1, 7]), encoded.batch(3, [0, 1, 7]))
    assert cached.rows(items.each[2:4]) == [2, 3] and cached.asked(0, [0])[0].startswith("the ")


def test_two_pictures_that_changed_places_are_noticed(recording: Recording, items: Items, folder: Path, tmp_path: Path):
    cache = ConditionCache(write(tmp_path / "c", recording, items))
    shutil.copytree(folder, tmp_path / "swapped")
    for name, number in (("0.png", 1), ("1.png", 0)):
        picture(number).save(tmp_path / "swapped" / name)
    with pytest.raises(
        UserError, match=r"^row 1 of items\.jsonl is not what it was .* a picture has changed, and 1 more"
    ):
        cache.refuse_other_items(read_items(tmp_path / "swapped", type(recording.pipeline)))
    with pytest.raises(UserError, match="--resume: the items or their pictures differ"):
        write(tmp_path / "c", recording, read_items(tmp_path / "swapped", type(recording.pipeline)), resume=True)
    fewer = Items(items.each[:3], items.files, "fewer")
    with pytest.raises(UserError, match="is of 5 items, and fewer has 3"):
        cache.refuse_other_items(fewer)


def test_it_goes_on_to_the_same_files(recording: Recording, items: Items, tmp_path: Path) -> None:
    write(tmp_path / "whole", recording, items)
    write(tmp_path / "parts", recording, items, stop=1)
    with pytest.raises(UserError, match="is not complete"):
        ConditionCache(tmp_path / "parts")
    write(tmp_path / "parts", recording, items, resume=True)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    index = json.loads((tmp_path / "whole" / "index.json").read_text())
    assert index["format"] == "fewstep-cache-3" and index["source"] == str(items.files[0].parent)


def test_further_answers_come_back_and_the_picture_stands_there_once(
    tmp_path: Path, recording: Recording, items: Items
):
    told = [
        further(Conditioning({"image": Leaf(torch.rand(1, 1000), 1), "text": Leaf(torch.rand(1, 3), 1)}, 1), n, "image")
        for n in range(5)
    ]
    writer = CacheWriter(tmp_path / "c", recording, "tiny", items.each, 5, False)
    writer.enter([writer.write(0, told)])
    cache = ConditionCache(tmp_path / "c")
    assert all(equal(cache[n], told[n]) and equal(in_memory(told)[n], told[n]) for n in range(5))
    assert [len(cache[n].others) for n in range(5)] == [2] * 5
    assert cache[1].others[1].tree["text"].value.tolist() == [[12.0] * 3]
    assert (tmp_path / "c" / "shard_00000.safetensors").stat().st_size < 2 * 5 * 4000, (
        "the picture is there three times"
    )
    conditions = Conditions(recording, items=items.each, cache=cache)
    assert conditions.further == 2 and equal(conditions.others([3])[0], told[3].others[0])


def test_no_picture_is_opened_where_a_cache_is_read(
    recording: Recording, items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ConditionCache(write(tmp_path / "c", recording, items))

    def refuse(_picture: Any) -> None:
        raise AssertionError("a picture was opened")

    monkeypatch.setattr(item_pictures, "_opened", refuse)
    cache.refuse_other_items(items)
    conditions = Conditions(recording, items=items.each, cache=cache)
    assert conditions.select([4, 0]).batch_size == 2 and len(conditions) == 5


def test_items_of_several_forms_are_called_in_groups(recording: Recording, items: Items, tmp_path: Path) -> None:
    short = read_items(items.files[0].parent, type(recording.pipeline)).each[:2]
    told = [
        Conditioning({"image": Leaf(torch.rand(1, 4 + n, 2), 1), "text": Leaf(torch.rand(1, 3), 1)}, 1) for n in (0, 1)
    ]
    writer = CacheWriter(tmp_path / "c", recording, "tiny", short, 5, False)
    writer.enter([writer.write(0, told)])
    conditions = Conditions(recording, items=short, cache=ConditionCache(tmp_path / "c"))
    assert (
        conditions.grouped and conditions.note == "items of several forms: each batch is called in groups of equal form"
    )
    assert [len(rows) for rows, _ in conditions.select([0, 1, 0]).groups] == [2, 1]


def test_what_the_items_take_is_said(recording: Recording, items: Items) -> None:
    examples = examples_of(recording, items.each)
    _, tensors = stack(list(encode_each(recording, items.each, CutPrompts())))
    assert examples.total(1) == sum(tensor.nbytes for tensor in tensors.values())
    # The negative's text and the zeros in the place of its picture are alike in all.
    shared = [tensor.nbytes for tensor in tensors.values() if len(tensor) == 1]
    assert len(shared) == 2 and sum(shared) == examples.shared
    total, mean = (f"{size / 1e3:.1f} kB" for size in (examples.total(1), examples.own / 5))
    assert examples.describe(1) == f"5 items take about {total} once they are encoded, {mean} each"


def test_another_autoencoder_is_another_teacher(recording: Recording, items: Items, tmp_path: Path) -> None:
    """It decides nothing of prompts' conditioning, and all of a picture's."""
    cache = ConditionCache(write(tmp_path / "c", recording, items))
    other = tiny_editor()
    with torch.no_grad():
        other.vae.encoder.conv_in.weight.mul_(1.5)
    other = record(other, items=items.two())
    assert fingerprint(other).keys() == fingerprint(recording).keys()
    with pytest.raises(UserError, match="its vae differs from that of tiny"):
        cache.check(other, "tiny", first=items.each[0])


@pytest.mark.parametrize(
    "bad, words",
    [(torch.full((1, 3, 16, 16), torch.nan), "tells its unet NaN"), ([picture(0), picture(1)], "")],
    ids=["NaN", "a list for one picture"],
)
def test_an_item_that_the_teacher_cannot_encode_is_named(recording: Recording, items: Items, bad: Any, words: str):
    given = [dict(items.each[0].arguments), {"prompt": "a", "image": bad}]
    (_, item) = read_items(given, type(recording.pipeline)).each
    with pytest.raises(UserError, match=f"^item 2: .*{words}"):
        encode_one(recording, item)


def test_each_items_negative_is_cached_with_it_and_two_that_are_swapped_are_seen(
    recording: Recording, items: Items, tmp_path: Path
) -> None:
    """What guidance leads an item away from holds its own picture, whatever it is batched with."""
    cached = Conditions(recording, items=items.each, cache=ConditionCache(write(tmp_path / "cache", recording, items)))
    here = Conditions(recording, items=items.each)
    assert cached.further == here.further == recording.further > 0
    own = recording.negative_each(items.each)
    assert not any(equal(own[0][k], own[1][k]) for k in range(1))  # of two pictures
    for conditions in (cached, here):
        told = conditions.select([3, 0])
        for place, row in enumerate((3, 0)):
            one = told.select([place])
            assert len(one.others) == recording.further
            assert all(equal(a, b) for a, b in zip(one.others, own[row], strict=True))
            assert all(equal(a.select([place]), b) for a, b in zip(conditions.others([3, 0]), own[row], strict=True))
            assert not equal(one.others[0], own[3 - row][0])


def test_pictures_of_a_cache_are_known_by_their_bytes_and_not_decoded_again(
    folder: Path, items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To decode them takes ten times as long as to read them, and the cache was made of pictures that could be."""
    decoded: list[Any] = []
    monkeypatch.setattr(item_pictures, "as_meant", lambda picture, grey: decoded.append(picture))
    again = read_items(folder, type(tiny_editor()), cached=True)
    assert again.keys == items.keys and [a.form for a in again.each] == [b.form for b in items.each]
    assert [item.key for item in again.two()] == [item.key for item in items.two()] and decoded == []
    shutil.copytree(folder, tmp_path / "spoilt")
    content = (folder / "1.png").read_bytes()
    (tmp_path / "spoilt" / "1.png").write_bytes(content[: len(content) // 2])
    spoilt = read_items(tmp_path / "spoilt", type(tiny_editor()), cached=True)
    assert [a == b for a, b in zip(spoilt.keys, items.keys, strict=True)] == [True, False, True, True, True]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"1\.png cannot be read any more: "):
        _ = spoilt.each[1].arguments["image"]
