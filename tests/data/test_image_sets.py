"""Images in shards and folders, and what they show: the same content is the same data; what cannot be used is named."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from pathlib import Path

import image_sets
import pytest
import tiny_pipelines
import torch
from image_sets import CAPTIONS, FORMS, jpeg, two_samples, write_parquet, write_tar

from fewstep.data import shard_index
from fewstep.data.batch import Real
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions, read_prompts
from fewstep.data.contents import changed_folders
from fewstep.data.images import image_contents, read_images
from fewstep.data.packed_texts import pack, unpack
from fewstep.errors import UserError
from fewstep.recording import Recording, record


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_pipelines.tiny_stable_diffusion())


@pytest.fixture(scope="module")
def conditions(recording: Recording) -> Conditions:
    return Conditions(recording, prompts=list(dict.fromkeys(CAPTIONS)))


# --- the same content ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [False, True], ids=["index in memory", "index in a folder"])
def test_every_form_gives_the_same_images_with_the_same_texts(tmp_path: Path, form: str, kept: bool):
    source = FORMS[form](tmp_path / "data")
    index = tmp_path / "index" if kept else None
    for _ in range(2):  # the second time from the index
        images = read_images(str(source), index=index)
        assert len(images) == len(CAPTIONS)
        assert images.texts is not None and list(images.texts) == [*images.texts] == list(CAPTIONS)
        assert [images.texts[k] for k in (6, 0, 4)] == ["eine Tür", "a cat", "a cat"]
        for k in range(len(CAPTIONS)):
            (tmp_path / "one.jpg").write_bytes(jpeg(k))
            alone = read_images(str(source), index=index).image(k, 3, 16, 16)
            assert torch.equal(images.image(k, 3, 16, 16), alone)
        images.refuse_unreadable()


def batches(source: Path, recording: Recording, conditions: Conditions, workers: int, index: Path | None = None):
    real = captioned(read_images(str(source), index=index), recording, conditions, workers=workers)
    found = []
    for step in range(5):  # two epochs, and a batch that lies in both
        positions = range(step * 3, step * 3 + 3)
        found.append(real.batch(0, positions))
        real.announce(0, [position + 3 for position in positions])
    return found


def same(a: Real, b: Real) -> bool:
    texts = [one.conditioning.arguments()["encoder_hidden_states"] for one in (a, b)]
    return torch.equal(a.x0, b.x0) and torch.equal(*texts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_bit_equal_in_every_form_and_with_any_number_of_workers(
    tmp_path: Path, recording: Recording, conditions: Conditions, form: str, workers: int
):
    expected = batches(image_sets.folder_with_a_table(tmp_path / "expected"), recording, conditions, 0)
    found = batches(FORMS[form](tmp_path / "data"), recording, conditions, workers, tmp_path / "index")
    assert len(expected) == len(found) == 5
    assert all(map(same, expected, found))
    assert not same(found[0], found[1])


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_batch_is_the_same_wherever_the_stream_is_entered(
    tmp_path: Path, recording: Recording, conditions: Conditions, form: str
):
    """As a resumed run does, and each of several processes."""
    source = FORMS[form](tmp_path / "data")
    whole = batches(source, recording, conditions, 2)
    real = captioned(read_images(str(source)), recording, conditions, workers=1)
    for rank in range(3):
        one = real.batch(0, [3 * 3 + rank])
        assert torch.equal(one.x0, whole[3].x0[rank : rank + 1])


def test_labels_are_for_teachers_of_labels_and_texts_for_those_of_prompts(tmp_path: Path, conditions: Conditions):
    dit = record(tiny_pipelines.tiny_dit())
    labels = Conditions(dit, labels=range(3))
    rows = [k % 3 for k in range(len(CAPTIONS))]
    for form in ("tar", "parquet", "metadata.jsonl", "metadata.csv"):
        images = read_images(str(FORMS[form](tmp_path / form)))
        assert captioned(images, dit, labels).rows_among(labels) == rows
    images = read_images(str(image_sets.folder_of_pairs(tmp_path / "pairs")))
    with pytest.raises(UserError, match="--data has texts alone, and this teacher takes labels"):
        captioned(images, dit, labels)


def test_images_in_class_folders_with_texts_are_both(tmp_path: Path, recording: Recording, conditions: Conditions):
    """As img2dataset's files are, whose folders are numbers and no labels for a teacher of prompts."""
    for k, caption in enumerate(CAPTIONS):
        folder = tmp_path / "data" / f"{k // 4:05}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:09}.jpg").write_bytes(jpeg(k))
        (folder / f"{k:09}.txt").write_text(caption, encoding="utf-8")
        (folder / f"{k:09}.json").write_text("{}")
    images = read_images(str(tmp_path / "data"))
    assert images.captions == [0, 0, 0, 0, 1, 1, 1]
    assert images.passed_over == "; 7 files passed over: 7 .json"
    expected = batches(image_sets.tars(tmp_path / "tars"), recording, conditions, 0)
    assert all(map(same, batches(tmp_path / "data", recording, conditions, 0), expected))


def test_texts_of_images_are_prompts_each_once(tmp_path: Path):
    for form, make in FORMS.items():
        prompts = read_prompts(make(tmp_path / form), index=tmp_path / "index")
        assert prompts == ["a cat", "a dog", "ein Dach", "a tree", "two boats", "eine Tür"]
    write_tar(tmp_path / "silent.tar", {"a.jpg": jpeg(0)})
    with pytest.raises(UserError, match=r"--prompts .*silent\.tar has images without texts"):
        read_prompts(tmp_path / "silent.tar")


def test_webdataset_reads_the_same_samples(tmp_path: Path):
    """Its own reader as the oracle of what belongs together."""
    webdataset = pytest.importorskip("webdataset")
    members: dict[str, bytes | str] = {}
    for name in ("plain", "in/a/folder", "UPPER", "many.dots.here", "spaced out"):
        stem, dot, rest = name.partition(".")
        members |= {f"{stem}{dot}{rest}.JPG": jpeg(len(name)), f"{stem}.txt": name, f"{stem}.cls": str(len(name))}
    members |= {"__meta__/x.json": "{}", "nothing": "x"}
    shard = write_tar(tmp_path / "shard.tar", members)
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    images = read_images(str(shard))
    assert images.texts is not None and images.captions is not None
    assert list(images.texts) == [one["txt"].decode() for one in theirs]
    assert list(images.captions) == [int(one["cls"]) for one in theirs]
    bytes_of = [next(one[key] for key in one if key.lower().endswith("jpg")) for one in theirs]
    assert [images.files[k].read() for k in range(5)] == bytes_of


# --- which texts -----------------------------------------------------------------------------------------------------


def test_the_texts_may_be_in_a_field_or_a_column_that_is_named(tmp_path: Path):
    fields = {"caption": "short", "long": "a longer one"}
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.json": json.dumps(fields)})
    assert list(read_images(str(shard)).texts or ()) == ["short"]
    assert list(read_images(str(shard), "long").texts or ()) == ["a longer one"]
    columns = {"image": [jpeg(0)], "caption": ["short"], "text": ["x"], "long": ["a longer one"]}
    table = write_parquet(tmp_path / "0.parquet", columns)
    with pytest.raises(UserError, match="has text and caption: say by --data_text which of them is meant"):
        read_images(str(table))
    assert list(read_images(str(table), "long").texts or ()) == ["a longer one"]
    with pytest.raises(UserError, match="has no column wide; there are: caption, image, long, text"):
        read_images(str(table), "wide")


def test_an_index_of_other_texts_is_not_taken(tmp_path: Path):
    shard = write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.txt": "one", "a.long": "two"})
    for text, expected in ((None, "one"), ("long", "two")):
        assert list(read_images(str(shard), text, tmp_path / "index").texts or ()) == [expected]


# --- known by their contents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_shard_that_has_changed_is_named_and_a_copy_is_the_same(tmp_path: Path, form: str):
    source = FORMS[form](tmp_path / "data")
    known = image_contents(read_images(str(source)), str(source))
    assert len(known) == 2
    copy = FORMS[form](tmp_path / "copy")
    assert changed_folders(known, image_contents(read_images(str(copy)), str(copy))) == []
    second = sorted(copy.iterdir())[1]
    second.write_bytes(second.read_bytes().replace(b"two boats", b"two goats"))
    assert changed_folders(known, image_contents(read_images(str(copy)), str(copy), known)) == [second.name]


def test_what_a_shard_holds_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, index = image_sets.tars(tmp_path / "data"), tmp_path / "index"
    read_images(str(source), index=index)
    opened: list[Path] = []
    real_open = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *rest: opened.append(path) or real_open(path, *rest))
    assert list(read_images(str(source), index=index).texts or ()) == list(CAPTIONS)
    assert opened == []
    two_samples(source / "shard-00001.tar", a_cls="0", b_cls="1")
    opened.clear()
    assert list(read_images(str(source), index=index).texts or ()) == [*CAPTIONS[:4], "one", "two"]
    assert opened == [source / "shard-00001.tar"]


def test_a_damaged_index_is_made_again(tmp_path: Path):
    source, index = image_sets.tars(tmp_path / "data"), tmp_path / "index"
    read_images(str(source), index=index)
    for file in index.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    shard_index._opened.cache_clear()
    assert list(read_images(str(source), index=index).texts or ()) == list(CAPTIONS)


def test_no_image_and_no_text_of_shards_is_held_in_memory(tmp_path: Path):
    """What is held of a set grows with its shards and not with its images."""
    members: dict[str, bytes | str] = {}
    for k in range(300):
        members |= {f"{k}.jpg": os.urandom(3000), f"{k}.txt": "x" * 1000}
    write_tar(tmp_path / "0.tar", members)
    images = read_images(str(tmp_path / "0.tar"), index=tmp_path / "index")
    held = sum(sys.getsizeof(part) for part in vars(images.files.shards[0]).values())
    assert held < 2000 and len(images) == 300


def test_texts_of_any_length_are_packed():
    texts = ["", "eine Tür", "", "x" * 1000, ""]
    assert unpack(*pack(texts)) == texts
    assert unpack(*pack([""])) == [""]
