"""A checkpoint that says less than the loop needs, or nonsense, under a digest that agrees: a line, no file changed."""

import json
from pathlib import Path
from typing import Any

import pytest
from toys import TinyMethod, make_loop

from fewstep.data.durable import json_sha256
from fewstep.errors import UserError
from fewstep.training import checkpoint
from fewstep.training.counters import counters
from tests.training.loop_runs import config, run

ABSENT = object()


def forged(out: Path, **changes: Any) -> None:
    """The newest checkpoint says something else, and everything that it names agrees with it."""
    folder = checkpoint.find_latest(out / "checkpoints").folder
    file = folder / "state.json"
    state = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    state = {key: value for key, value in (state | changes).items() if value is not ABSENT}
    for path in folder.iterdir():
        if path.name not in {*state["files"], file.name}:
            path.unlink()
    file.write_text(json.dumps({**state, "sha256": json_sha256(state)}))


def snapshot(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    run(tmp_path / "run", max_steps=2, ema_decay=0.9, method=TinyMethod(ema=True))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": ABSENT}, "it has no method"),
        ({"method": 3}, "its method is no text"),
        ({"processes": ABSENT}, "it has no processes"),
        ({"processes": 0}, "its processes are none"),
        ({"renewed_at": ABSENT}, "it has no renewed_at"),
        ({"renewed_at": {"student": "0", "critic": 0}}, "its student is no whole number"),
        ({"batch": 4}, "its batch is no table"),
        ({"batch": {"samples": 4}}, "it has no given"),
        ({"batch": {"samples": 0, "given": [4, 1]}}, "its samples are none"),
        ({"owed": [1]}, "its owed is no table"),
        ({"owed": {"student/matching": "1"}}, "its student/matching is no whole number or number"),
    ],
)
def test_counters_that_are_missing_or_cannot_be_are_named(out: Path, changes: dict[str, Any], words: str) -> None:
    forged(out, **changes)
    before = snapshot(out)
    with pytest.raises(UserError, match=words) as caught:
        make_loop(TinyMethod(ema=True), config(out, ema_decay=0.9)).resume()
    assert "state.json" in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(out) == before


@pytest.mark.parametrize("absent", ["student", "critic_optimizer", "ema", "unlogged"])
def test_a_checkpoint_without_a_file_of_a_role_is_refused(out: Path, absent: str) -> None:
    files = checkpoint.find_latest(out / "checkpoints").state["files"]
    forged(out, files={name: entry for name, entry in files.items() if name != f"{absent}.safetensors"})
    before = snapshot(out)
    with pytest.raises(UserError, match=rf"holds nothing of {absent};"):
        make_loop(TinyMethod(ema=True), config(out, ema_decay=0.9)).resume()
    assert snapshot(out) == before


def test_a_role_that_was_not_trained_then_is_named(out: Path) -> None:
    forged(out, renewed_at={"student": 0})
    with pytest.raises(UserError, match="holds nothing of critic;"):
        make_loop(TinyMethod(ema=True), config(out, ema_decay=0.9)).resume()


def test_one_of_an_earlier_version_has_what_is_needed(out: Path) -> None:
    forged(out, batch=ABSENT)
    assert counters(checkpoint.find_latest(out / "checkpoints"))["step"] == 2
    make_loop(TinyMethod(ema=True), config(out, ema_decay=0.9)).resume()
