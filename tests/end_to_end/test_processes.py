"""Whole runs of several processes, launched as users do, through to a student that stock diffusers loads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fewstep.programs.methods import methods
from fewstep.recording.watch.shake import shaken
from fewstep.training import checkpoint
from tests import tiny_pipelines
from tests.stock_process import run_stock

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
}
RUN = "--steps 2 --max_steps 3 --batch_size 2 --lr 1e-3 --log_steps 1 --sample_steps 0 --cpu"
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
    "speed_up_net": "--num_pairs 12 --pair_steps 2 --solver_steps 2",
}
#: Methods whose teachers have a text; those of the others have labels.
TOLD_TEXTS = {"speed_up_net"}
SOON = 60.0  # seconds for all to end

#: One launch of seconds. torchrun gives its processes what tests/forked.py gives them.
QUICK = ("accelerate", "dmd2", "")
EVERY = [
    pytest.param(launcher, method, lora, marks=[] if (launcher, method, lora) == QUICK else pytest.mark.soak)
    for launcher in LAUNCHERS
    for method in SETTINGS
    for lora in ("", "--lora_rank 2" if method in TOLD_TEXTS else "--lora_rank 2 --merge")
]
#: Of a process that never saw this package.
_STOCK = """
import json, sys
import diffusers, numpy, torch
folder, told = sys.argv[1:]
about = json.load(open(f"{folder}/fewstep.json"))
trust = {"trust_remote_code": True} if "code" in about else {}
student = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], **trust)
student.set_progress_bar_config(disable=True)
call = {**about["call"], **json.loads(told), "output_type": "np", "generator": torch.Generator().manual_seed(0)}
assert numpy.isfinite(student(**call).images).all()
"""
#: The same of a student that is told a picture, at the place that is given.
_STOCK_EDITOR = _STOCK.replace("json.loads(told)", '{"prompt": "a cat", "image": PIL.Image.open(told)}').replace(
    "import json, sys", "import json, sys, PIL.Image"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_pipelines.tiny_dit(), "transformer", tmp_path_factory.mktemp("teachers") / "dit")


@pytest.fixture(scope="module")
def told_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, with prompts beside it."""
    folder = saved(tiny_pipelines.tiny_stable_diffusion(), "unet", tmp_path_factory.mktemp("teachers") / "sd")
    (folder / "prompts.txt").write_text("a cat\na dog\ntwo cats\n")
    return folder


def saved(pipeline: Any, network: str, folder: Path) -> Path:
    with shaken(getattr(pipeline, network)):
        pipeline.save_pretrained(folder)
    return folder


def start(
    launcher: str, method: str, teacher: Path, out: Path, flags: str, items: Path | None = None
) -> "subprocess.Popen[str]":
    words = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS[launcher], "-m", f"fewstep.trainers.{method}"]
    told = ["--prompts", str(teacher / "prompts.txt")] if method in TOLD_TEXTS else ["--classes", "0-2"]
    told = told if items is None else ["--items", str(items)]
    words += ["--teacher", str(teacher), "--out", str(out), *told, *f"{RUN} {SETTINGS[method]} {flags}".split()]
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
    assert SETTINGS.keys() == set(methods())


@pytest.mark.parametrize(("launcher", "method", "lora"), EVERY)
def test_two_processes_end_in_a_student_that_stock_diffusers_loads(
    teacher: Path, told_texts: Path, tmp_path: Path, launcher: str, method: str, lora: str
) -> None:
    out, texts = tmp_path / "two", method in TOLD_TEXTS
    run = start(launcher, method, told_texts if texts else teacher, out, lora)
    said = finish(run)
    assert run.returncode == 0, said[-4000:]
    runs = [out / f"student_{k}" for k in (1, 2, 3)] if method == "multi_student" else [out]
    assert said.count("2 processes on cpu") == len(runs)
    run_stock(_STOCK, str(out / "student"), json.dumps({"prompt": "a cat"} if texts else {"class_labels": [1]}))
    for folder in runs:
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows == [1, 2, 3]


@pytest.mark.soak
@pytest.mark.parametrize("flags", ["", "--lora_rank 2 --merge"])
def test_two_processes_that_look_at_pictures(editor: Path, items: Path, tmp_path: Path, flags: str) -> None:
    """Guided by three answers, each process with items of its own."""
    out, guided = tmp_path / "two", "--guidance_scale 6 --image_guidance_scale 1.5"
    run = start("accelerate", "dmd2", editor, out, f"{guided} {flags}", items)
    said = finish(run)
    assert run.returncode == 0, said[-4000:]
    assert said.count("2 processes on cpu") == 1
    run_stock(_STOCK_EDITOR, str(out / "student"), str(items.parent / "0.png"))
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
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
