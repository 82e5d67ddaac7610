"""Images in shards and folders, and what they show: the same content is the same data; what cannot be used is named."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import image_sets
import pytest
import tiny_pipelines
import torch
from image_sets import CAPTIONS, FORMS, jpeg, write_parquet, write_tar

from fewstep.data import shard_index
from fewstep.data.batch import Real
from fewstep.data.conditions import Conditions, read_prompts
from fewstep.data.contents import changed_folders
from fewstep.data.images import image_contents, read_images
from fewstep.data.packed_texts import pack, unpack
from fewstep.data.real import RealSamples
from fewstep.errors import UserError
from fewstep.recording import Recording, record


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_pipelines.tiny_stable_diffusion())


@pytest.fixture(scope="module")
def conditions(recording: Recording) -> Conditions:
    return Conditions(recording, prompts=list(dict.fromkeys(CAPTIONS)))


def two_samples(shard: Path, **changed: bytes | str | None) -> Path:
    """A shard of two samples, with members changed, added or (None) left out."""
    members: dict[str, bytes | str] = {"a.jpg": jpeg(0), "a.txt": "one", "b.jpg": jpeg(1), "b.txt": "two"}
    members |= {name.replace("_", "."): value for name, value in changed.items() if value is not None}
    for name in changed:
        if changed[name] is None:
            del members[name.replace("_", ".")]
    return write_tar(shard, members)


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
    real = RealSamples(read_images(str(source), index=index), recording, conditions, workers=workers)
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
    real = RealSamples(read_images(str(source)), recording, conditions, workers=1)
    for rank in range(3):
        one = real.batch(0, [3 * 3 + rank])
        assert torch.equal(one.x0, whole[3].x0[rank : rank + 1])


def test_labels_are_for_teachers_of_labels_and_texts_for_those_of_prompts(tmp_path: Path, conditions: Conditions):
    dit = record(tiny_pipelines.tiny_dit())
    labels = Conditions(dit, labels=range(3))
    rows = [k % 3 for k in range(len(CAPTIONS))]
    for form in ("tar", "parquet", "metadata.jsonl", "metadata.csv"):
        images = read_images(str(FORMS[form](tmp_path / form)))
        assert RealSamples(images, dit, labels).rows_among(labels) == rows
    images = read_images(str(image_sets.folder_of_pairs(tmp_path / "pairs")))
    with pytest.raises(UserError, match="--data has texts alone, and this teacher takes labels"):
        RealSamples(images, dit, labels)


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


# --- what cannot be used ---------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, bytes | str | None], str]] = {
    "no caption": ({"b_txt": None}, r"1 samples of --data cannot be used: 0\.tar: b\.jpg has no text"),
    "another key": ({"b_txt": None, "bb_txt": "two"}, r"2 samples .* bb has \.txt and no image, 0\.tar: b\.jpg has no"),
    "two images": ({"b_png": jpeg(2)}, r"0\.tar: b has several images \(jpg, png\)"),
    "a bad label": ({"a_cls": "1.5", "b_cls": "2"}, r"0\.tar: a \(its label '1\.5' is no whole number\)"),
    "a label missing": ({"a_cls": "1"}, r"0\.tar: b\.jpg has no label"),
    "no UTF-8": ({"a_txt": b"\xff\xfe"}, r"0\.tar: a \('utf-8' codec"),
    "no JSON": ({"a_txt": None, "a_json": "{"}, r"0\.tar: a \(Expecting"),
}


@pytest.mark.parametrize("fault", BAD)
def test_samples_that_cannot_be_used_are_named_with_shard_and_key(tmp_path: Path, fault: str):
    changed, message = BAD[fault]
    two_samples(tmp_path / "data" / "0.tar", **changed)
    with pytest.raises(UserError, match=message) as caught:
        read_images(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_many_are_counted_and_the_first_named(tmp_path: Path):
    members = {f"{k:03}.jpg": jpeg(0) for k in range(40)} | {"000.txt": "one"}
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(UserError, match=r"39 samples .*0\.tar: 001\.jpg has no text.*005\.jpg has no text, \.\.\.;"):
        read_images(str(tmp_path))


def test_images_that_cannot_be_read_are_named_before_training(tmp_path: Path):
    two_samples(tmp_path / "0.tar", b_jpg=jpeg(1)[:200])
    with pytest.raises(UserError, match=r"1 of 2 images of --data cannot be read: 0\.tar: b\.jpg \(Truncated"):
        read_images(str(tmp_path)).refuse_unreadable()
    with pytest.raises(UserError, match=r"0\.tar: b\.jpg is not an image that can be read"):
        read_images(str(tmp_path)).image(1, 3, 8, 8)


NO_SHARDS: dict[str, tuple[Callable[[bytes, int, int], bytes], str]] = {
    "ends after a member": (lambda content, second, end: content[:second], "is truncated or damaged after"),
    "ends in a header": (lambda content, second, end: content[: second + 300], "is truncated or damaged after"),
    "ends in an image": (lambda content, second, end: content[: second + 600], r"it ends inside b\.jpg"),
    "ends without an end": (lambda content, second, end: content[:end], "is truncated or damaged after"),
    "other bytes in it": (
        lambda content, second, end: content[:second] + b"x" * 512 + content[second + 512 :],
        "is truncated or damaged after",
    ),
    "no archive": (lambda content, second, end: b"no archive", "is no tar archive that can be read"),
    "compressed": (lambda content, second, end: gzip.compress(content), "compressed have to be unpacked"),
}


@pytest.mark.parametrize("fault", NO_SHARDS)
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, fault: str):
    """Python's tarfile takes the rest of such an archive for its end."""
    cut, message = NO_SHARDS[fault]
    shard = two_samples(tmp_path / "0.tar")
    assert len(read_images(str(shard))) == 2
    with tarfile.open(shard) as archive:
        second, last = archive.getmember("b.jpg").offset, archive.getmember("b.txt").offset
    shard.write_bytes(cut(shard.read_bytes(), second, last + 1024))
    with pytest.raises(UserError, match=message):
        read_images(str(shard))


def test_parquet_files_that_cannot_be_used_are_refused(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    with pytest.raises(UserError, match="has no column with images' bytes; its columns are text"):
        read_images(str(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "b.parquet", {"image": [jpeg(0), None, None], "text": ["x", "y", "z"]})
    with pytest.raises(UserError, match=r"2 samples .* b\.parquet: 1 images of row group 0 are empty"):
        read_images(str(tmp_path / "b.parquet"))
    write_parquet(tmp_path / "c.parquet", {"image": [jpeg(0)] * 2, "text": ["x", None]})
    with pytest.raises(UserError, match=r"c\.parquet: row 1 has no text"):
        read_images(str(tmp_path / "c.parquet"))
    write_parquet(tmp_path / "d.parquet", {"one": [jpeg(0)], "two": [jpeg(0)]})
    with pytest.raises(UserError, match=r"several columns of bytes \(one, two\)"):
        read_images(str(tmp_path / "d.parquet"))
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is no parquet file that can be read"):
        read_images(str(tmp_path / "e.parquet"))


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": [jpeg(0)]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fewstep\[data\]'"):
        read_images(str(path))


def test_several_sets_in_one_folder_are_not_mixed(tmp_path: Path):
    two_samples(tmp_path / "train-00000-of-00001.tar")
    two_samples(tmp_path / "test-00000-of-00001.tar")
    with pytest.raises(UserError, match=r"several sets of shards \(test-\*-of-\*\.tar, train-\*"):
        read_images(str(tmp_path))
    assert len(read_images(str(tmp_path / "train-*"))) == 2
    (tmp_path / "one.jpg").write_bytes(jpeg(0))
    (tmp_path / "test-00000-of-00001.tar").unlink()
    with pytest.raises(UserError, match="holds images and shards"):
        read_images(str(tmp_path))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda root: (root / "0003.txt").unlink(), r"1 of 7 images of --data have no \.txt beside them.*0003\.jpg"),
        (lambda root: (root / "0003.txt").write_bytes(b"\xff"), r"0003\.txt is not UTF-8 text"),
    ],
)
def test_a_text_that_is_missing_beside_an_image_is_named(tmp_path: Path, act: Callable[[Path], object], message: str):
    root = image_sets.folder_of_pairs(tmp_path / "data")
    act(root)
    with pytest.raises(UserError, match=message):
        read_images(str(root))


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
