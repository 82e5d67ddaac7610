"""Whole runs of several processes, launched as users do, through to a student that stock diffusers loads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fewstep.programs.methods import methods
from fewstep.recording.shake import shaken
from fewstep.training import checkpoint
from tests import tiny_pipelines

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
}
RUN = "--steps 2 --max_steps 3 --batch_size 2 --lr 1e-3 --log_steps 1 --sample_steps 0 --cpu --classes 0-2"
#: What a method needs beside RUN, to be short.
SETTINGS = {
    "flash_dmd": "--critic_updates 1 --gan_weight 0",
    "hyper_sd": "--stages tscd:2,score --segments [2,1] --stage_steps [1] --critic_updates 1",
    "multi_student": "--critic_updates 1 --students 3",
    "snoopi": "--critic_updates 1",
    "dmd2": "--critic_updates 1 --report_to tensorboard",
    "disback": "--critic_updates 1 --degradation_steps 1 --node_steps 1",
    "phased_dmd": "--critic_updates 1 --phases [1,1]",
    "sid": "--critic_updates 1",
    "consistency": "",
    "perflow": "--num_pairs 12 --pair_steps 2 --solver_steps 2",
    "continuous_consistency": "--num_pairs 12 --pair_steps 2 --variant rcm --matching_first_step 0 --critic_updates 1",
    "rectified_flow": "--num_pairs 12 --pair_steps 2",
    "mdt_dist": "--num_pairs 12 --pair_steps 2",
    "mean_flow": "--num_pairs 12 --pair_steps 2",
    "segmented_consistency": "--variant tscd --segments [2,1] --stage_steps [1]",
    "any_flow": "--num_pairs 12 --pair_steps 2 --map_steps 2 --critic_updates 1",
    "free_flow": "--steps 1",
    "twin_flow": "--num_pairs 12 --pair_steps 2",
    "mf_rae": "--num_pairs 12 --pair_steps 2 --walk_steps 2 --stages cmt:1,mfd",
}
SOON = 60.0  # seconds for all to end

#: One launch of seconds; torchrun's is that of test_sharded.py.
QUICK = ("accelerate", "dmd2", "")
EVERY = [
    pytest.param(launcher, method, lora, marks=[] if (launcher, method, lora) == QUICK else pytest.mark.soak)
    for launcher in LAUNCHERS
    for method in SETTINGS
    for lora in ("", "--lora_rank 2 --merge")
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "dit"
    pipeline = tiny_pipelines.tiny_dit()
    with shaken(pipeline.transformer):
        pipeline.save_pretrained(folder)
    return folder


def start(launcher: str, method: str, teacher: Path, out: Path, flags: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS[launcher], "-m", f"fewstep.trainers.{method}"]
    words += ["--teacher", str(teacher), "--out", str(out), *f"{RUN} {SETTINGS[method]} {flags}".split()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def finish(run: "subprocess.Popen[str]", seconds: float = 300) -> str:
    """What it said, once it has ended."""
    try:
        return run.communicate(timeout=seconds)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def test_every_method_is_run() -> None:
    assert SETTINGS.keys() == set(methods()) - {"speed_up_net"}  # whose teachers have a text, and this one labels


@pytest.mark.parametrize(("launcher", "method", "lora"), EVERY)
def test_two_processes_end_in_a_student_that_stock_diffusers_loads(
    teacher: Path, tmp_path: Path, launcher: str, method: str, lora: str
) -> None:
    out = tmp_path / "two"
    run = start(launcher, method, teacher, out, lora)
    said = finish(run)
    assert run.returncode == 0, said[-4000:]
    runs = [out / f"student_{k}" for k in (1, 2, 3)] if method == "multi_student" else [out]
    assert said.count("2 processes on cpu") == len(runs)
    student = DiffusionPipeline.from_pretrained(out / "student", trust_remote_code=True)
    about = json.loads((out / "student" / "fewstep.json").read_text())
    call = {"class_labels": [1], **about["call"]}
    image = student(**call, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert torch.from_numpy(image).isfinite().all()
    for folder in runs:
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows == [1, 2, 3]


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_killed_process_ends_the_launch_and_the_run_goes_on(
    teacher: Path, tmp_path: Path, launcher: str, rank: int
) -> None:
    out = tmp_path / "out"
    run = start(launcher, "dmd2", teacher, out, "--max_steps 100000 --checkpointing_steps 5")
    while 5 not in checkpoint.steps_in(out / "checkpoints"):
        assert run.poll() is None, finish(run)
        time.sleep(0.2)
    workers = {ranks[0]: pid for pid in processes_of(run.pid) if (ranks := ranks_of(pid))}
    os.kill(workers[rank], signal.SIGKILL)
    killed = time.monotonic()
    said = finish(run, SOON)
    assert run.returncode != 0 and time.monotonic() - killed < SOON
    assert [line for line in said.splitlines() if line.startswith("fewstep: ")] == [
        f"fewstep: process {rank} died; all processes have ended; start them again with --resume"
    ]
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    last = checkpoint.steps_in(out / "checkpoints")[-1]
    again = start(launcher, "dmd2", teacher, out, f"--checkpointing_steps 5 --resume --max_steps {last + 2}")
    assert again.wait(300) == 0
    assert checkpoint.steps_in(out / "checkpoints")[-1] == last + 2 and (out / "student").is_dir()


def processes_of(parent: int) -> list[int]:
    """The processes that a launcher started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def ranks_of(pid: int) -> list[int]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return [int(word.partition("=")[2]) for word in words if word.startswith("RANK=")]
