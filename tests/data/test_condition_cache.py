"""The cache: written in shards that survive a kill, read row by row, and refused where it does not belong."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import tiny_dit, tiny_stable_diffusion

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.data import condition_cache
from fewstep.data.condition_cache import INDEX, CacheWriter, ConditionCache
from fewstep.data.conditions import Conditions, CutPrompts, encode_each
from fewstep.data.tensor_rows import TensorRows
from fewstep.errors import UserError
from fewstep.recording import Recording, record

PROMPTS = ["a cat", "a dog", "the tree", "b", "the cat"]


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record(tiny_stable_diffusion(), prompt="a")


def write(folder: Path, recording: Recording, items: list[Any], size: int = 2, stop: int | None = None, **more) -> Path:
    writer = CacheWriter(folder, recording, "tiny", items, size, more.get("resume", False))
    for shard in list(writer.missing)[:stop]:
        writer.enter([writer.write(shard, list(encode_each(recording, writer.of(shard), CutPrompts())))])
    return folder


def text(conditioning: Conditioning) -> torch.Tensor:
    return conditioning.arguments()["encoder_hidden_states"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_holds_what_each_prompt_is_encoded_to(recording: Recording, tmp_path: Path) -> None:
    cache = ConditionCache(write(tmp_path / "c", recording, PROMPTS))
    assert len(cache) == 5 and cache.kind == "prompt" and cache.items() == PROMPTS
    for number, alone in enumerate(recording.condition_each(prompts=PROMPTS)):
        assert torch.equal(text(cache[number]), text(alone))
        assert cache[number].describe() == alone.describe()
    assert torch.equal(text(cache.negative()), text(recording.negative()))
    assert sorted(files(tmp_path / "c")) == [
        INDEX,
        "negative.safetensors",
        *(f"shard_0000{k}.safetensors" for k in (0, 1, 2)),
    ]


def test_a_run_draws_the_same_conditions_from_it(recording: Recording, tmp_path: Path) -> None:
    cached = Conditions(recording, cache=ConditionCache(write(tmp_path / "c", recording, PROMPTS)))
    encoded = Conditions(recording, prompts=PROMPTS)
    assert len(cached) == len(encoded) == 5
    for positions in ([0, 1, 2, 3], [7, 4], range(20, 25)):
        assert torch.equal(text(cached.batch(3, positions)), text(encoded.batch(3, positions)))
    assert cached.rows(["b", "a cat"]) == encoded.rows(["b", "a cat"]) == [3, 0]
    assert cached.rows(["b", "unheard of"]) is None


def test_only_rows_that_are_asked_for_are_read(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand prompts cost what a batch costs: no shard is loaded as a whole."""
    big = [Conditioning({"text": Leaf(torch.full((1, 2000), float(n)), 1)}, 1) for n in range(40)]
    writer = CacheWriter(tmp_path / "c", recording, "tiny", list(map(str, range(40))), 20, False)
    for shard in writer.missing:
        writer.enter([writer.write(shard, big[shard * 20 : shard * 20 + 20])])
    read: list[int] = []

    class Counted:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = condition_cache_safe_open(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Any:
            raise AssertionError(f"{name} was read as a whole")

    condition_cache_safe_open, row = condition_cache.safe_open, TensorRows.row
    monkeypatch.setattr(condition_cache, "safe_open", Counted)
    monkeypatch.setattr(
        TensorRows, "row", lambda self, *asked: read.append(row(self, *asked).numel()) or row(self, *asked)
    )
    cache = ConditionCache(tmp_path / "c")
    assert cache.kinds() == [0] and read == []
    assert [float(cache[n].arguments()["text"][0, 0]) for n in (0, 19, 20, 39)] == [0.0, 19.0, 20.0, 39.0]
    assert read == [2000] * 4


def test_what_was_read_once_does_not_stay_in_memory(recording: Recording, tmp_path: Path) -> None:
    """A run that sees each item holds one batch of them, not all: what is mapped would count as its own."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs a system that says what is resident")
    size, count = 400_000, 100
    writer = CacheWriter(tmp_path / "c", recording, "tiny", list(map(str, range(count))), count, False)
    big = [Conditioning({"text": Leaf(torch.full((1, size // 4), float(n)), 1)}, 1) for n in range(count)]
    writer.enter([writer.write(0, big)])
    del big
    cache = ConditionCache(tmp_path / "c")
    assert float(cache[0].arguments()["text"][0, 0]) == 0.0
    before = resident()
    assert [float(cache[n].arguments()["text"][0, -1]) for n in range(count)] == list(map(float, range(count)))
    assert resident() - before < 0.2 * count * size


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_a_row_is_what_the_file_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": (torch.arange(24).reshape(4, 2, 3) % 7).to(dtype),
        "a": torch.ones(4).to(dtype),
        "none": torch.empty(4, 0, dtype=dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"of": "a test"})
    rows = TensorRows(tmp_path / "x.safetensors", tensors)
    for name, whole in tensors.items():
        for number in (3, 0):
            row = rows.row(name, number)
            assert row.dtype == dtype and torch.equal(row, whole[number])
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(150)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read any more: x\.safetensors ends before"):
        rows.row("b", 3)


def test_labels_are_cached_too(tmp_path: Path) -> None:
    recording = record(tiny_dit(), class_labels=[1])
    cache = ConditionCache(write(tmp_path / "c", recording, [3, 1, 4, 1, 5]))
    conditions = Conditions(recording, cache=cache)
    assert conditions.select([0, 2, 4]).arguments()["class_labels"].tolist() == [3, 4, 5]
    assert cache.negative().arguments()["class_labels"].tolist() == [1000]


# --- killed and resumed -----------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_goes_on_to_the_same_files(recording: Recording, tmp_path: Path) -> None:
    """SIGKILL at random moments, in a forked process each; finished shards are not written again.

    None gets further than to its first shard, so that each finds a process to kill, however busy the machine is.
    """
    items = [f"{word} {number}" for number in range(8) for word in ("a", "the")]
    began = time.monotonic()
    write(tmp_path / "whole", recording, items, 2)
    longest = (time.monotonic() - began) / 5
    moments, hits = random.Random(0), 0

    def shards() -> int:
        return len(list((tmp_path / "killed").glob("shard_*")))

    for _ in range(8):
        process = os.fork()
        if process == 0:
            write(tmp_path / "killed", recording, items, 2, resume=True)
            os._exit(0)
        moment, there = time.monotonic() + moments.uniform(0, longest), shards()
        while time.monotonic() < moment and shards() == there:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(process, 0)[1])
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard_*")}
    write(tmp_path / "killed", recording, items, 2, resume=True)
    listed = json.loads((tmp_path / "killed" / INDEX).read_text())["shards"]
    assert hits >= 6 and len(listed) == 8
    unlisted = sum(path.stat().st_mtime_ns != before for path, before in kept.items())
    assert unlisted <= 1  # the one that was on the disk and not in the index yet
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert all(killed[name] == content for name, content in whole.items())


def test_a_damaged_shard_is_written_again_on_resume(recording: Recording, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", recording, PROMPTS)
    before = files(folder)
    (folder / "shard_00001.safetensors").write_bytes(b"xx")
    write(folder, recording, PROMPTS, resume=True)
    assert files(folder) == before


def test_a_full_disk_is_one_line_and_loses_nothing(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "c", recording, PROMPTS, stop=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="make room on the disk, then --resume"):
        patch.setattr(condition_cache, "save_file", full)
        write(folder, recording, PROMPTS, resume=True)
    with pytest.raises(UserError, match="not complete"):
        ConditionCache(folder)
    assert len(ConditionCache(write(folder, recording, PROMPTS, resume=True))) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resume": False}, "already holds a cache; add --resume"),
        ({"items": ["a cat"]}, "the prompts or classes differ"),
        ({"size": 3}, "--shard_size differ"),
    ],
)
def test_what_does_not_go_on_is_refused(
    changes: dict[str, Any], words: str, recording: Recording, tmp_path: Path
) -> None:
    folder = write(tmp_path / "c", recording, PROMPTS, stop=1)
    chosen = {"items": PROMPTS, "size": 2, "resume": True, **changes}
    with pytest.raises(UserError, match=words):
        write(folder, recording, chosen["items"], chosen["size"], resume=chosen["resume"])


# --- refused where it does not belong ---------------------------------------------------------------------------


def test_damage_and_other_versions_are_one_line(recording: Recording, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no cache"):
        ConditionCache(tmp_path / "nothing")
    for name, damage, words in (
        ("shard_00001.safetensors", lambda content: content[:-8], "damaged: shard_00001"),
        ("shard_00000.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged: shard_00000"),
        ("negative.safetensors", lambda content: b"", "damaged: negative"),
        (INDEX, lambda content: content[:-9], "damaged: index.json"),
        (INDEX, lambda content: content.replace(b'"items": 5', b'"items": 4'), "damaged: index.json"),
        (INDEX, lambda content: content.replace(b"fewstep-cache-2", b"fewstep-cache-9"), "of another version"),
        (INDEX, lambda content: b"[]", "damaged: index.json"),
    ):
        folder = write(tmp_path / f"c{len(list(tmp_path.iterdir()))}", recording, PROMPTS)
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        with pytest.raises(UserError, match=words) as caught:
            ConditionCache(folder)
        assert "\n" not in str(caught.value)
    folder = write(tmp_path / "gone", recording, PROMPTS)
    (folder / "shard_00002.safetensors").unlink()
    with pytest.raises(UserError, match="damaged: shard_00002"):
        ConditionCache(folder)


def test_another_teacher_is_refused_by_name_of_what_differs(recording: Recording, tmp_path: Path) -> None:
    cache = ConditionCache(write(tmp_path / "c", recording, PROMPTS))
    cache.check(recording, "tiny")
    other = tiny_stable_diffusion()
    with torch.no_grad():
        next(other.text_encoder.parameters())[0, 0] += 1
    with pytest.raises(UserError, match=r"of another teacher \(tiny\): its text_encoder differs from that of other"):
        cache.check(record(other, prompt="a"), "other")
    with pytest.raises(UserError, match="made with another --call"):
        cache.check(record(tiny_stable_diffusion(), prompt="a", negative_prompt="b"), "tiny")
    with pytest.raises(UserError, match="of another teacher"):
        cache.check(record(tiny_dit(), class_labels=[1]), "dit")


def test_a_pipeline_that_encodes_otherwise_by_now_is_refused(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parts under other code, as after an update of diffusers."""
    cache = ConditionCache(write(tmp_path / "c", recording, PROMPTS))
    kind = type(recording.pipeline)
    encode = kind.encode_prompt
    monkeypatch.setattr(
        kind, "encode_prompt", lambda self, *a, **k: tuple(v if v is None else 1.1 * v for v in encode(self, *a, **k))
    )
    with pytest.raises(UserError, match="encodes otherwise"):
        cache.check(recording, "tiny")
