"""Pairs, caches and rows of an evaluation after a fault at any operation: they go on to the very same files."""

from pathlib import Path

import pytest
import torch
from tiny_pipelines import tiny_stable_diffusion

from fewstep.data.condition_cache import CacheWriter, ConditionCache
from fewstep.data.conditions import CutPrompts, encode_each
from fewstep.data.shards import Shards
from fewstep.recording import Recording, record
from tests.faults import Faults, every_fault

KINDS = pytest.mark.parametrize("kind", ["death", "power", "full"])


def files(folder: Path) -> dict[str, bytes]:
    """Of what counts: a kill may leave what it was writing, under a name that nobody reads."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".partial"}


@KINDS
def test_shards(kind: str, tmp_path: Path):
    def write(root: Path, resume: bool = False) -> None:
        shards = Shards.begin(root, {"format": "f", "num": 5, "shard_size": 2}, "make", resume=resume)
        for number in shards.numbers:
            if not shards.is_whole(number):
                shards.write(number, {"x": torch.arange(2.0 * number, 2 * number + len(shards.rows(number)))})

    write(tmp_path / "whole")

    def check(root: Path, fault: Faults) -> None:
        write(root, resume=True)
        Shards.find(root, "f", "make")
        assert files(root) == files(tmp_path / "whole"), fault.happened

    every_fault(kind, write, check, at_least=12)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_stable_diffusion(), prompt="a")


@KINDS
def test_a_cache(kind: str, recording: Recording, tmp_path: Path):
    prompts = ["a cat", "a dog", "b"]
    encoded = dict(zip(prompts, encode_each(recording, prompts, CutPrompts())))

    def write(root: Path, resume: bool = False) -> None:
        writer = CacheWriter(root, recording, "tiny", prompts, 2, resume)
        for shard in writer.missing:
            writer.enter([writer.write(shard, [encoded[prompt] for prompt in writer.of(shard)])])

    write(tmp_path / "whole")

    def check(root: Path, fault: Faults) -> None:
        write(root, resume=True)
        assert len(ConditionCache(root)) == 3
        assert files(root) == files(tmp_path / "whole"), fault.happened

    every_fault(kind, write, check, at_least=20)
