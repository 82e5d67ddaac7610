"""What reaches TensorBoard, W&B and others, and that one which fails ends neither the run nor the others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fewstep
from fewstep.errors import UserError
from fewstep.training.monitor import Monitor
from fewstep.training.trackers import trackers
from tests import tiny_pipelines

SETTINGS = {"method": "tiny", "lr": 1e-3, "steps": 4, "cpu": True, "shift": None, "call": {"height": 8}}
RUN = {"steps": 1, "max_steps": 2, "batch_size": 2, "log_steps": 1, "sample_steps": 2, "cpu": True, "critic_updates": 1}


class Noted(GeneralTracker):
    """A tracker that takes notes, and fails from one call on."""

    name = "noted"
    requires_logging_directory = False

    def __init__(self, fails_in: str = "") -> None:
        super().__init__()
        self.fails_in, self.calls = fails_in, []

    @property
    def tracker(self) -> Noted:
        return self

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_in:
            raise ConnectionError(f"no server in {call}\nand a second line")

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("settings")

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self._note(f"log {step}")

    def finish(self) -> None:
        self._note("finish")


def monitor(out: Path, *kinds: Any) -> Monitor:
    made = Monitor(out, 3, Accelerator(cpu=True, log_with=list(kinds), project_dir=str(out)))
    made.start_trackers(SETTINGS)
    return made


def curves(out: Path, tag: str) -> dict[int, float]:
    """What TensorBoard read of one number, by step."""
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def test_a_run_reports_numbers_settings_and_sample_grids(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fewstep.distill(tiny_pipelines.tiny_ddim(), out=str(out), report_to="tensorboard", **RUN)
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = {row["step"]: row["student/matching"] for row in rows}
    assert curves(out, "student/matching") == pytest.approx(expected, rel=1e-6) and set(expected) == {1, 2}
    (picture,) = events.Images("samples")
    assert (picture.step, picture.encoded_image_string[:4]) == (2, b"\x89PNG")
    (hparams,) = (out / "logs").rglob("hparams.yml")
    text = hparams.read_text()
    assert "method: dmd2\n" in text and "lr: 1.0e-05\n" in text and "shift: None\n" in text
    assert "cpu" not in text and str(tmp_path) not in text, "what is of this machine is no hyperparameter"


@pytest.mark.parametrize("fails_in", ["start", "settings", "log 1", "finish"])
def test_a_tracker_that_fails_says_so_in_one_line_and_the_others_go_on(
    fails_in: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Noted(fails_in), Noted()
    with caplog.at_level(logging.WARNING, "fewstep"):
        kept = monitor(tmp_path, failing, "tensorboard", other)
        kept.log(1, {"loss": 1.0})
        kept.log(2, {"loss": 0.5})
        kept.close()
    assert failing.calls[-1] == fails_in, "once it failed it is left alone"
    assert other.calls == ["start", "settings", "log 1", "log 2", "finish"]
    assert curves(tmp_path, "loss") == {1: 1.0, 2: 0.5}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert "failed" in line and f"no server in {fails_in}" in line and "goes on without it" in line and "\n" not in line


def picture_of(out: Path) -> Path:
    """A grid that a run may have written."""
    Image.new("L", (8, 8), 128).save(out / "grid.png")
    return out / "grid.png"


def test_a_picture_that_a_tracker_refuses_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("no pictures today")

    monkeypatch.setattr(TensorBoardTracker, "log_images", refuse)
    other = Noted()
    kept = monitor(tmp_path, "tensorboard", other)
    kept.log(1, {"loss": 1.0})
    kept.show(1, picture_of(tmp_path))
    kept.log(2, {"loss": 0.5})
    kept.close()
    assert "tensorboard failed (no pictures today); the run goes on without it" in caplog.text
    assert curves(tmp_path, "loss") == {1: 1.0}
    assert "log 2" in other.calls, "one that takes no pictures is not asked to"


def test_wandb_gets_them_too_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "my-run"
    out.mkdir()
    kept = monitor(out, "tensorboard", "wandb")
    kept.log(2, {"student/loss": 0.5})
    kept.show(2, picture_of(out))
    kept.close()
    assert curves(out, "student/loss") == {2: 0.5}
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    assert all(word in written for word in (b"fewstep", b"my-run", b"student/loss", b"method", b"tiny"))
    assert list(file.parent.glob("files/media/images/samples_2_*.png"))


def test_several_are_asked_for_by_name_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.training.trackers.get_available_trackers", lambda: ["tensorboard", "mlflow"])
    assert trackers("tensorboard, mlflow") == ["tensorboard", "mlflow"]
    assert trackers("none") is None
    with pytest.raises(UserError, match="aim: that tracker is not installed"):
        trackers("tensorboard,aim")
    with pytest.raises(UserError, match="'nowhere': it is auto, none, or among"):
        trackers("nowhere")
