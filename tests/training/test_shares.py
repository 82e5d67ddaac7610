"""A step keeps its samples on any number of processes, or the run is refused with what would keep them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import train

from fewstep.config.run import RunConfig
from fewstep.errors import UserError
from fewstep.training.run_folder import write_config
from fewstep.training.shares import Share, kept_batch, refuse_other_batch, shared_out
from tests.forked import well


class Coupled(RunConfig):
    couples_samples = True


def config(out: Path, batch_size: int, micro_batches: int, kind: type[RunConfig] = RunConfig) -> RunConfig:
    return kind(teacher="t", out=str(out), batch_size=batch_size, gradient_accumulation_steps=micro_batches)


def resumed(
    out: Path, begun: Share, batch_size: int, micro_batches: int, processes: int, **more: Any
) -> tuple[Share, str]:
    """How a run of ``begun`` goes on, and what it says of that."""
    write_config(out, "tiny", config(out, begun.batch_size, begun.micro_batches))
    state = {"processes": begun.processes, "batch": begun.state()}
    kept, line = kept_batch(config(out, batch_size, micro_batches, **more), state, processes)
    return Share.of(kept, processes), line


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_sample_of_a_step_is_in_one_micro_batch(micro_batches: int, processes: int) -> None:
    share = Share(2, micro_batches, processes)
    parts = [share.indices(rank, micro) for micro in range(micro_batches) for rank in range(processes)]
    assert sorted(index for part in parts for index in part) == list(range(share.samples))
    # On another number of processes the same samples are in a micro-batch of all of them.
    together = [index for rank in range(processes) for index in share.indices(rank, micro_batches - 1)]
    assert together == list(range(share.samples - 2 * processes, share.samples))


@pytest.mark.parametrize(
    ("samples", "processes", "batch_size", "expected"),
    [(8, 1, 2, (2, 4)), (8, 2, 4, (4, 1)), (8, 8, 4, (1, 1)), (12, 1, 5, (4, 3)), (6, 1, 1, (1, 6)), (6, 4, 2, None)],
)
def test_no_process_gets_larger_micro_batches_than_it_was_given(
    samples: int, processes: int, batch_size: int, expected: tuple[int, int] | None
) -> None:
    assert shared_out(samples, processes, batch_size) == (expected and Share(*expected, processes))


def test_the_same_line_goes_on_with_any_number_of_processes_that_divides_the_samples(tmp_path: Path) -> None:
    assert resumed(tmp_path, Share(2, 1, 2), 2, 1, 2) == (Share(2, 1, 2), "")
    share, line = resumed(tmp_path, Share(2, 1, 2), 2, 1, 1)
    assert share == Share(2, 2, 1)
    assert line == "a step keeps its 4 samples on 1 process: --batch_size 2 --gradient_accumulation_steps 2"
    share, _ = resumed(tmp_path, Share(2, 1, 2), 2, 1, 4)
    assert share == Share(1, 1, 4)


def test_the_first_line_is_known_after_the_settings_have_changed(tmp_path: Path) -> None:
    """Begun by two processes, gone on with by one, which wrote its own settings; started again by its first line."""
    write_config(tmp_path, "tiny", config(tmp_path, 2, 2))
    state = {"processes": 1, "batch": Share(2, 1, 2).state()}
    kept, _ = kept_batch(config(tmp_path, 2, 1), state, 1)
    assert Share.of(kept, 1) == Share(2, 2, 1)
    kept, line = kept_batch(config(tmp_path, 2, 2), state, 1)  # and by the settings that lie there
    assert Share.of(kept, 1) == Share(2, 2, 1) and line == ""


def test_the_same_samples_may_be_shared_as_one_likes(tmp_path: Path) -> None:
    assert resumed(tmp_path, Share(4, 1, 2), 1, 4, 2) == (Share(1, 4, 2), "")


def test_what_cannot_be_kept_is_refused_with_flags_that_keep_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"6 samples.* 4 processes.*: start 3 with --batch_size 2 --gradient_accum.* 1$"
    ):
        resumed(tmp_path, Share(3, 1, 2), 3, 1, 4)
    with pytest.raises(
        UserError, match=r"has 6 samples.* on 2 processes are 10: give --batch_size 3 --gradient_accum.* 1"
    ):
        resumed(tmp_path, Share(3, 1, 2), 5, 1, 2)


def test_samples_that_weigh_each_other_stay_in_as_many_micro_batches(tmp_path: Path) -> None:
    share, _ = resumed(tmp_path, Share(2, 2, 2), 2, 2, 1, kind=Coupled)
    assert share == Share(4, 2, 1)
    with pytest.raises(UserError, match=r"4 samples.*cannot share equally: start 2 with --batch_size 1"):
        resumed(tmp_path, Share(1, 2, 2), 1, 2, 4, kind=Coupled)


def test_a_run_of_an_earlier_version_goes_on_as_it_was(tmp_path: Path) -> None:
    write_config(tmp_path, "tiny", config(tmp_path, 2, 1))
    kept, line = kept_batch(config(tmp_path, 2, 1), {"processes": 2}, 2)
    assert (kept.batch_size, line) == (2, "")
    with pytest.raises(UserError, match=r"begun by 2 processes.*go on with 2"):
        kept_batch(config(tmp_path, 2, 1), {"processes": 2}, 1)
    with pytest.raises(UserError, match="has 4 samples"):
        kept_batch(config(tmp_path, 3, 1), {"processes": 2}, 2)
    refuse_other_batch(tmp_path, {"processes": 2}, Share(2, 1, 2))


def test_a_checkpoint_between_two_logged_lines_keeps_what_all_processes_have_to_log(tmp_path: Path) -> None:
    """The student moves in every second step only, so its numbers wait for the next line."""
    settings = {"batch_size": 2, "log_steps": 4, "checkpointing_steps": 3, "max_steps": 8, "checkpoints_total_limit": 9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    well(2, lambda _rank: train(whole, settings), tmp_path / "said")
    shutil.copytree(whole, parts)
    for step in (6, 8):
        shutil.rmtree(parts / "checkpoints" / f"step_{step:08d}")
    well(2, lambda _rank: train(parts, settings), tmp_path / "said")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    rows = [{row["step"]: row for row in map(json.loads, each)} for each in lines]
    assert {**rows[0][4], "seconds": 0} == {**rows[1][4], "seconds": 0}
    assert "student/matching" in rows[0][4]
