"""Whole runs of several processes, launched as users do, through to a student that stock diffusers loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny_pipelines

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TINY_RUN = "--steps 2 --max_steps 3 --critic_updates 1 --batch_size 2 --lr 1e-3 --log_steps 1 --cpu true"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "ddim"
    tiny_pipelines.tiny_ddim().save_pretrained(folder)
    return folder


def launch(teacher: Path, out: Path, *flags: str) -> None:
    words = [sys.executable, "-W", "ignore", *TORCHRUN, "-m", "fewstep.trainers.dmd2", "--teacher", str(teacher)]
    words += ["--out", str(out), *TINY_RUN.split(), "--report_to", "tensorboard", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def test_two_processes_end_in_a_student_that_stock_diffusers_loads(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    launch(teacher, out)
    student = DiffusionPipeline.from_pretrained(out / "student")
    about = json.loads((out / "student" / "fewstep.json").read_text())
    image = student(**about["call"], output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert image.isfinite().all() and len(about["counts"]) == 2
    before = student.unet.state_dict()

    launch(teacher, out, "--resume", "--max_steps", "5")
    after = DiffusionPipeline.from_pretrained(out / "student").unet.state_dict()
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5], "the log of the resumed run goes on where the first one ended"
