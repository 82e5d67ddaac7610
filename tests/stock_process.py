"""Students sampled by one process in which ``import fewstep`` fails: what stock diffusers makes of their folders."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

# What the scheduler gives at the last step, and which networks were called, at every count of fewstep.json.
_STOCK = """
import inspect, json, sys
sys.modules["fewstep"] = None
import diffusers, numpy, torch
torch.set_num_threads(1)
out, *folders = sys.argv[1:]
saved = {}
for folder in folders:
    about = json.load(open(f"{folder}/fewstep.json"))
    trust = {"trust_remote_code": True} if "code" in about else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **about["load"], **trust)
    pipeline.set_progress_bar_config(disable=True)
    called, latents, kind = [], [], type(pipeline.scheduler)
    step = kind.step
    def watched(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        latents.append(found[0] if isinstance(found, tuple) else found.prev_sample)
        return found
    watched.__signature__ = inspect.signature(step)  # pipelines ask it which arguments it takes
    kind.step = watched
    for name in about.get("experts") or [about["component"]]:
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: called.append(name))
    told = {"prompt": {"prompt": "a cat"}, "label": {"class_labels": [3]}, None: {}}[about["conditional"]]
    for count in about["counts"]:
        called.clear()
        call = {**about["call"], **told, "num_inference_steps": count}
        pipeline(**call, generator=torch.Generator().manual_seed(5))
        saved[f"{folder} {count} latents"] = latents[-1].float().numpy()
        saved[f"{folder} {count} called"] = numpy.array(called)
    kind.step = step
numpy.savez(out, **saved)
"""


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
    """Sample the students in ``folders``, in one process, as it takes seconds to start; ``out`` is an .npz file."""
    words = [sys.executable, "-W", "ignore", "-c", _STOCK, *map(str, (out, *folders))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {str(folder): Sampled() for folder in folders}
    with numpy.load(out) as file:
        for key in file:
            folder, count, what = key.rsplit(" ", 2)
            if what == "latents":
                found[folder].latents[int(count)] = torch.from_numpy(file[key])
            else:
                found[folder].called[int(count)] = file[key].tolist()
    return list(found.values())
