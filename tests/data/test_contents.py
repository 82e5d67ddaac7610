"""Digests of inputs: cheap, of contents alone, and another one for every change."""

import os
from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_dit
from torch import nn

from fewstep.data.contents import changed_folders, contents_of
from fewstep.data.fingerprint import memory_digests


def test_files_are_not_read_again_while_their_times_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a" / "b.bin"
    file.parent.mkdir()
    file.write_bytes(b"1" * 100)
    young = contents_of(tmp_path, [file])
    assert young["a"]["seen"] is None  # it could change again within the clock's tick
    monkeypatch.setattr("fewstep.data.contents._SETTLED", -1.0)
    known = contents_of(tmp_path, [file])
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.data.contents.file_digest", lambda path: pytest.fail("it was read again"))
        assert contents_of(tmp_path, [file], known) == known
    before = file.stat()
    file.write_bytes(b"2" * 100)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # set back, as an unpacked archive does
    assert changed_folders(known, contents_of(tmp_path, [file], known)) == ["a"]


@pytest.mark.parametrize("place", [0, 2**24 + 5, 2**26 + 17])
def test_of_a_large_file_blocks_count(tmp_path: Path, place: int):
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2**26 + 18)
    before = contents_of(path, [path])
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert changed_folders(before, contents_of(path, [path])) == [""]


class Packed(nn.Parameter):
    """As a quantising library holds weights: a parameter that is not its own numbers."""

    def __new__(cls, data: torch.Tensor) -> "Packed":
        return torch.Tensor._make_subclass(cls, data, False)


def test_a_pipeline_in_memory_counts_by_its_bits_quantised_or_not():
    pipeline = tiny_dit()
    before = memory_digests(pipeline)
    assert memory_digests(tiny_dit()) == before
    with torch.no_grad():
        weight = list(pipeline.vae.parameters())[-1].view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    assert changed_folders(before, memory_digests(pipeline)) == ["vae"]
    layer = pipeline.transformer.proj_out_2
    layer.weight = Packed(torch.ones(layer.weight.shape, dtype=torch.int8))
    packed = memory_digests(pipeline)
    layer.weight = Packed(layer.weight.data.index_fill(0, torch.tensor([3]), 2))
    assert changed_folders(packed, memory_digests(pipeline)) == ["transformer"]
