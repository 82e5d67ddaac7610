"""Students sampled by processes in which ``import fewstep`` fails: what stock diffusers makes of their folders.

Each is forked from one that never saw fewstep and has imported diffusers, which takes longer than most of them do.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

# Reads jobs, a line each, and answers with their exit codes; it ends with its standard input. It runs no tensor itself,
# so that there is no thread which a fork would lose.
_CLEAN = """
import json, os, sys, traceback
sys.modules["fewstep"] = None
import diffusers, numpy, torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.argv = ["stock", *job["words"]]
            exec(compile(job["code"], "stock", "exec"), {"__name__": "__main__"})
            assert sys.modules["fewstep"] is None
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@functools.cache
def _clean() -> subprocess.Popen[str]:
    words = [sys.executable, "-W", "ignore", "-c", _CLEAN]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_stock(code: str, *words: str) -> None:
    """Run a program in a process without fewstep, which ends well, or the test fails with what it said.

    Args:
        code: of the program.
        *words: its ``sys.argv[1:]``.
    """
    server = _clean()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        said = Path(place) / "said.txt"
        server.stdin.write(json.dumps({"code": code, "words": words, "said": str(said)}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline().strip()
        assert answer == "0", f"exit code {answer or 'unknown'}: {said.read_text()[-3000:] if said.exists() else ''}"


def allowed(first: Tensor, last: Tensor) -> float:
    """How far from a stock pipeline's last sample a walk of fewstep's own may end, relative to its largest entry.

    1e-5, and what a scheduler loses that comes from noise of 700 to 0 in float32 (Stable Video Diffusion).
    """
    return 1e-5 + torch.finfo(torch.float32).eps * float(first.abs().max() / last.abs().max())


#: Notes what every step of a scheduler's class is given and gives: watch(kind) is the list of both.
WATCH = """
import inspect
def watch(kind):
    step, seen = kind.step, []
    def watched(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        sample = inspect.signature(step).bind(self, *args, **kwargs).arguments["sample"]
        seen.append((sample.clone(), found[0] if isinstance(found, tuple) else found.prev_sample))
        return found
    watched.__signature__ = inspect.signature(step)  # pipelines ask it which arguments it takes
    kind.step = watched
    return seen
"""

#: Stands in for ftfy, with which Wan's pipelines repair texts, and which need not be installed.
PLAIN_TEXTS = """
import builtins
builtins.ftfy = type("Unchanged", (), {"fix_text": staticmethod(str)})
"""

# What the scheduler gives at the last step, and which networks were called, at every count of fewstep.json.
_STOCK = (
    WATCH
    + """
import json, sys
import diffusers, numpy, torch
out, *folders = sys.argv[1:]
saved = {}
for folder in folders:
    about = json.load(open(f"{folder}/fewstep.json"))
    trust = {"trust_remote_code": True} if "code" in about else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], **trust)
    pipeline.set_progress_bar_config(disable=True)
    called, kind = [], type(pipeline.scheduler)
    step, seen = kind.step, watch(kind)
    for name in about.get("experts") or [about["component"]]:
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: called.append(name))
    told = {"prompt": {"prompt": "a cat"}, "label": {"class_labels": [3]}, None: {}}[about["conditional"]]
    for count in about["counts"]:
        called.clear()
        call = {**about["call"], **told, "num_inference_steps": count}
        pipeline(**call, generator=torch.Generator().manual_seed(5))
        saved[f"{folder} {count} latents"] = seen[-1][1].float().numpy()
        saved[f"{folder} {count} called"] = numpy.array(called)
    kind.step = step
numpy.savez(out, **saved)
"""
)


@dataclass
class Sampled:
    """What a student's folder gives at each count of steps, for "a cat", or class 3, and the generator of seed 5.

    Attributes:
        latents: (1, ...), as the scheduler leaves them at the last step.
        called: the names of the networks, in the order of their calls.
    """

    latents: dict[int, Tensor] = field(default_factory=dict)
    called: dict[int, list[str]] = field(default_factory=dict)


def sample_stock(out: Path, *folders: Path) -> list[Sampled]:
    """Sample the students in ``folders``, in one process; ``out`` is an .npz file."""
    run_stock(_STOCK, *map(str, (out, *folders)))
    found = {str(folder): Sampled() for folder in folders}
    with numpy.load(out) as file:
        for key in file:
            folder, count, what = key.rsplit(" ", 2)
            if what == "latents":
                found[folder].latents[int(count)] = torch.from_numpy(file[key])
            else:
                found[folder].called[int(count)] = file[key].tolist()
    return list(found.values())
