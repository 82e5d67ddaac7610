"""Samples of shards and folders that cannot be used: counted, and the first named, before anything is trained."""

from __future__ import annotations

import gzip
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import image_sets
import pytest
from image_sets import jpeg, two_samples, write_parquet, write_tar

from fewstep.data.images import read_images
from fewstep.errors import UserError

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
