"""Runs that train on shards: the same student with any workers, undisturbed or resumed, and the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import image_sets
import pytest
import torch
from image_sets import FORMS
from safetensors.torch import load_file
from tiny_pipelines import tiny_stable_diffusion

from fewstep.cli import main
from fewstep.data.batch import Batches
from fewstep.data.captioned import captioned
from fewstep.data.conditions import Conditions
from fewstep.data.images import read_images
from fewstep.recording import record


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_stable_diffusion().save_pretrained(folder)
    return folder


def train(teacher: Path, source: Path, out: Path, steps: int, *more: str) -> int:
    words = ["distill", "dmd2", "--gan_weight", "1e-3", "--teacher", str(teacher), "--prompts", str(source)]
    words += ["--data", str(source), "--out", str(out), "--max_steps", str(steps), "--batch_size", "3", "--steps", "1"]
    return main([*words, "--lora_rank", "2", "--sample_steps", "0", "--report_to", "none", "--cpu", *more])


def student(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "student_lora" / "pytorch_lora_weights.safetensors")


def test_a_run_trains_on_shards_and_takes_their_texts_for_prompts(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    source = image_sets.tars(tmp_path / "tars")
    words = ["distill", "consistency", "--variant", "ect", "--teacher", str(teacher), "--prompts", str(source)]
    words += ["--data", str(source), "--out", str(tmp_path / "out"), "--max_steps", "1", "--batch_size", "3"]
    assert (
        main([*words, "--lora_rank", "2", "--steps", "1", "--sample_steps", "0", "--report_to", "none", "--cpu"]) == 0
    )
    assert "--data: 7 images" in [record.getMessage() for record in caplog.records]


@pytest.mark.soak
def test_a_run_from_shards_is_the_same_after_a_resume_with_other_workers_and_names_what_has_changed(
    teacher: Path, tmp_path: Path, capfd: Any
):
    tars = image_sets.tars(tmp_path / "tars")
    assert train(teacher, tars, tmp_path / "whole", 3) == 0
    whole = student(tmp_path / "whole")
    assert train(teacher, tars, tmp_path / "again", 2) == 0
    assert train(teacher, tars, tmp_path / "again", 3, "--resume", "--data_workers", "0") == 0
    assert all(torch.equal(value, student(tmp_path / "again")[name]) for name, value in whole.items())
    shard = tars / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"two boats", b"two goats"))
    capfd.readouterr()
    assert train(teacher, tars, tmp_path / "again", 4, "--resume") == 2
    error = capfd.readouterr().err
    assert f"--data {tars} (shard-00001.tar)" in error and "--prompts" in error and "is not what it was" in error


def test_a_run_that_is_refused_can_be_started_again(teacher: Path, tmp_path: Path, capfd: Any):
    source = image_sets.tars(tmp_path / "tars")
    shard = source / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    for _ in range(2):  # what was kept of the first shard is no other run's
        assert train(teacher, source, tmp_path / "out", 1) == 2
        assert "shard-00001.tar is no tar archive" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data_index"]


@pytest.mark.parametrize("form", FORMS)
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_processes(tmp_path: Path, form: str):
    recording = record(tiny_stable_diffusion())
    prompts = list(dict.fromkeys(image_sets.CAPTIONS))
    conditions = Conditions(recording, prompts=prompts)
    source = FORMS[form](tmp_path / "data")

    def steps(processes: int, workers: int) -> list[torch.Tensor]:
        """The real samples of two steps, those of all processes in their order."""
        found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        for rank in range(processes):
            images = read_images(str(source), index=tmp_path / "index")
            real = captioned(images, recording, conditions, workers=workers)
            batches = Batches(conditions, recording.sample_shape, torch.device("cpu"), real, announce=real.announce)
            size = 4 // processes
            for step in found:
                batch = batches.micro_batch(0, step, range(rank * size, (rank + 1) * size), 4, logging=False)
                found[step].append(batch.real.x0)
        return [torch.cat(parts) for parts in found.values()]

    alone, together = steps(1, 0), steps(2, 2)
    assert all(map(torch.equal, alone, together)) and not torch.equal(*alone)
