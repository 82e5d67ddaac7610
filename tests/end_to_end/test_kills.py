"""SIGKILL at random moments of a run, from its start to its export: what it makes in the end is bit-equal all the same.

Each start is killed after a random part of what an undisturbed one takes; of several processes, a random one is. They
are forked from a process that has imported the package and done nothing else: what other tests leave in this one is not
in it.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.training import checkpoint
from tests import tiny_pipelines

TRAINING = "--report_to none --max_steps 12 --batch_size 2 --log_steps 1 --checkpointing_steps 2 --num_pairs 24"
COMMAND = f"distill rectified_flow --classes 0-2 --cpu {TRAINING} --sample_steps 6"
STEPS = "--steps 2 --report_to none --batch_size 2 --log_steps 1 --checkpointing_steps 1 --checkpoints_total_limit 99"
STAGED = f"--classes 0-2 --cpu --sample_steps 0 {STEPS}"
PAIRS = "--num_pairs 8 --pair_steps 2"
#: Runs of stages: the command, and what there is when a start of it is killed, one after the other: a step or a file.
STAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "tscd": (
        "segmented_consistency --max_steps 6 --variant tscd --segments [4,2,1] --stage_steps [2,2]"
        " --adversarial_weight [0,0.1,0.1]",
        ("1", "2", "3", "4", "5"),
    ),
    "hyper_sd": (
        "hyper_sd --max_steps 6 --stages tscd:4,score --segments [2,1] --stage_steps [2] --critic_updates 1",
        ("1", "2", "3", "4", "5"),
    ),
    "mf_rae": (
        f"mf_rae --max_steps 5 {PAIRS} --walk_steps 2 --stages cmt:3,mfd",
        ("pairs", "2", "3", "4"),
    ),
    "any_flow": (
        f"any_flow --max_steps 5 {PAIRS} --map_steps 3 --critic_updates 1 --ema_decay 0.5",
        ("pairs", "2", "3", "4"),
    ),
    "multi_student": (
        "multi_student --max_steps 3 --students 3 --critic_updates 1",
        ("student_1/2", "student_1/student", "student_2/1", "student_2/2", "student_3/2", "student_3/student"),
    ),
    "disback": (
        "disback --max_steps 5 --degradation_steps 2 --node_steps 1 --critic_updates 1",
        ("1", "2", "3", "4"),
    ),
    "flash_dmd": (
        "flash_dmd --max_steps 4 --critic_updates 1 --gan_weight 0",
        ("1", "2", "3"),
    ),
}
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["fewstep.trainers.rectified_flow", "fewstep.cli", "diffusers"])
MET = " processes on cpu"  # in the first line of a launch
SOON = 60.0  # seconds after which the others of a launch have ended
#: Files that hold the name of the folder that they lie in, and what was left of one by a process that was killed.
UNEQUAL = ("config.yaml", "fewstep.json", "README.md", ".about.json.")


def run(words: list[str], said: Path, place: dict[str, str]) -> None:
    """In a process of its own: the command, whose lines go to a file."""
    os.environ |= place
    with said.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        torch.set_num_threads(1)
        sys.exit(main(words))


def start(words: list[str], said: Path, count: int = 1) -> list[ForkServerProcess]:
    """The processes of one launch, in the order of their ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    processes = []
    for rank in range(count):
        place = {**shared, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
        process = CLEAN.Process(target=run, args=(words, said, {name: str(value) for name, value in place.items()}))
        process.start()
        processes.append(process)
    return processes


def finish(words: list[str], said: Path, count: int) -> float:
    """Run undisturbed; returns the seconds that it took."""
    began = time.monotonic()
    processes = start(words, said, count)
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), said.read_text()[-3000:]
    return time.monotonic() - began


def killed_and_resumed(words: list[str], out: Path, kills: int, seconds: float, count: int) -> int:
    """Run to the end, killed so many times on the way, if a machine of changing speed lets it; returns the kills.

    Args:
        words: of the command.
        out: its folder.
        kills: that are wanted.
        seconds: that it took undisturbed; what is left of it takes less, and is taken anew whenever a kill came late.
        count: of its processes, one of which is killed; the others have to end by themselves.
    """
    moments, hits, met = random.Random(0), 0, 0
    said = out.parent / "said.txt"
    said.touch()
    for _ in range(8 * kills):
        if hits == kills:
            break
        began = time.monotonic()
        processes = start([*words, "--out", str(out), *_resume(out)], said, count)
        victim = processes[moments.randrange(count)]
        while count > 1 and victim.exitcode is None and said.read_text().count(MET) == met:
            time.sleep(0.01)  # until they have met, their launcher would end the others, and there is none here
        met = said.read_text().count(MET)
        victim.join(moments.uniform(0.2, 0.9) * seconds)
        victim.kill()
        for process in processes:
            process.join(SOON)
        assert all(process.exitcode is not None for process in processes), said.read_text()[-3000:]
        if victim.exitcode == -signal.SIGKILL:
            hits += 1
        else:
            seconds = time.monotonic() - began
    finish([*words, "--out", str(out), *_resume(out)], said, count)
    return hits


def killed_at(words: list[str], out: Path, moments: tuple[str, ...]) -> list[str]:
    """Run to the end, each start killed at the next moment; returns the moments that came before the run's end."""
    said, hit = out.parent / "said.txt", []
    said.touch()
    for moment in moments:
        (process,) = start([*words, "--out", str(out), *_resume(out)], said)
        while process.exitcode is None and not _come(out, moment):
            time.sleep(0.005)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            hit.append(moment)
        else:
            assert process.exitcode == 0, said.read_text()[-3000:]
    finish([*words, "--out", str(out), *_resume(out)], said, 1)
    return hit


def _come(out: Path, moment: str) -> bool:
    """Whether a file lies in the folder, or the checkpoint of a step where its last part is a number."""
    *parts, last = moment.split("/")
    folder = out.joinpath(*parts)
    if not last.isdecimal():
        return (folder / last).exists()
    return int(last) in checkpoint.steps_in(folder / "checkpoints")


def _resume(out: Path) -> list[str]:
    return ["--resume"] if (out / "config.yaml").exists() else []


def contents(out: Path) -> dict[str, object]:
    """What counts: not the clock's part of the log, the folder's own name, and a name of a process that was killed."""
    found: dict[str, object] = {}
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        elif path.name == "inputs.json":  # digests, but not when they were taken
            digests = json.loads(path.read_text(), object_hook=lambda one: {**one, "seen": 0})
            found[name] = digests["inputs"]
        elif path.is_file() and "checkpoints" not in path.relative_to(out).parts and not path.name.startswith(UNEQUAL):
            found[name] = path.read_bytes()
    for folder in (out, *sorted(out.glob("student_*"))):  # those of divided roles lie in another order each time
        for step in checkpoint.steps_in(folder / "checkpoints"):
            newest, of = checkpoint.find_latest(folder / "checkpoints", step), f"{folder.relative_to(out)} {step}"
            found[f"state {of}"] = {name: value for name, value in newest.state.items() if name != "files"}
            for stem, tensors in newest.tensors().items():
                found[f"{stem} {of}"] = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return found


@pytest.mark.parametrize(
    ("count", "kills", "flags"),
    [
        (1, 2, ""),
        pytest.param(1, 20, "", marks=pytest.mark.soak),
        pytest.param(2, 20, "", marks=pytest.mark.soak),
        pytest.param(2, 10, "--sharding full", marks=pytest.mark.soak),
    ],
)
def test_a_run_that_was_killed_at_any_moment_ends_like_one_that_was_not(
    count: int, kills: int, flags: str, tmp_path: Path
) -> None:
    tiny_pipelines.tiny_dit().save_pretrained(tmp_path / "teacher")
    words = [*COMMAND.split(), *flags.split(), "--teacher", str(tmp_path / "teacher")]
    finish(["--version"], tmp_path / "version.txt", 1)  # with which the process that all others come from begins
    seconds = finish([*words, "--out", str(tmp_path / "whole")], tmp_path / "whole.txt", count)
    hits = killed_and_resumed(words, tmp_path / "killed", kills, seconds, count)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert hits >= kills / 2
    assert checkpoint.find_latest(tmp_path / "killed" / "checkpoints").state["step"] == 12


@pytest.mark.parametrize(
    ("command", "moments"),
    [
        pytest.param(STAGES["tscd"][0], ("3",), id="tscd once"),
        *(pytest.param(*stages, marks=pytest.mark.soak, id=name) for name, stages in STAGES.items()),
    ],
)
def test_a_run_of_stages_that_was_killed_in_each_of_them_ends_like_one_that_was_not(
    command: str, moments: tuple[str, ...], tmp_path: Path
) -> None:
    tiny_pipelines.tiny_dit().save_pretrained(tmp_path / "teacher")
    words = ["distill", *command.split(), *STAGED.split(), "--teacher", str(tmp_path / "teacher")]
    finish(["--version"], tmp_path / "version.txt", 1)
    finish([*words, "--out", str(tmp_path / "whole")], tmp_path / "whole.txt", 1)
    hit = killed_at(words, tmp_path / "killed", moments)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len(hit) >= len(moments) / 2, hit


@pytest.mark.soak
@pytest.mark.parametrize("count", [1, 2])
def test_an_evaluation_that_was_killed_at_any_moment_has_the_same_report(count: int, tmp_path: Path) -> None:
    tiny_pipelines.tiny_dit().save_pretrained(tmp_path / "teacher")
    words = ["eval", "--teacher", str(tmp_path / "teacher"), "--teacher_steps", "1,4", "--classes", "0-2", "--cpu"]
    words += ["--num", "400", "--batch_size", "16", "--metrics", "saturation"]
    seconds = finish([*words, "--out", str(tmp_path / "whole")], tmp_path / "whole.txt", count)
    hits = killed_and_resumed(words, tmp_path / "killed", 20, seconds, count)
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("whole", "killed")]
    assert rows[0] == rows[1] and hits >= 10
    kept = [sorted((tmp_path / name / "images").rglob("*.png")) for name in ("whole", "killed")]
    assert len(kept[0]) == 800 and [p.read_bytes() for p in kept[0]] == [p.read_bytes() for p in kept[1]]
