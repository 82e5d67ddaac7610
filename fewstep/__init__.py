"""Few-step distillation of diffusion and flow-matching pipelines.

import fewstep

folder = fewstep.distill("fashion-sd", method="dmd2", steps=4, out="runs/mine")   # train and export a student
pipeline = fewstep.load(folder)                                                   # samples right by default
fewstep.apply(pipeline, "runs/mine/student_lora")                                 # the same for a LoRA student
fewstep.plug(tuned, folder)                                                       # a SpeedUpNet adapter on a copy
fewstep.nasa(pipeline, "a coat", 0.3)                                             # steers away from a negative prompt
fewstep.evaluate([folder], teacher="fashion-sd", out="runs/mine/report")          # measure it beside its teacher
fewstep.cache("fashion-sd", "runs/cache", prompts="prompts.txt")                  # encode prompts once, for many runs
fewstep.make_pairs("fashion-sd", num=1000, out="runs/pairs")                      # noise and sample of its ODE
fewstep.plan("fashion-sd", "dmd2", batch_size=64)                                 # what a run would take
fewstep.record(pipeline)                                                          # how a pipeline calls its network
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.version import __version__

# In a checkout, trainers/, pipelines/ and eval/ stand beside this package; in a wheel they are inside it.
if not (Path(__file__).parent / "trainers").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from fewstep.errors import UserError
    from fewstep.eval.during import distill
    from fewstep.eval.evaluate import evaluate
    from fewstep.export import apply, load, nasa, plug
    from fewstep.programs.cache import cache
    from fewstep.programs.pairs import make_pairs
    from fewstep.programs.planning.plan import plan
    from fewstep.recording import record

__all__ = [
    "UserError",
    "__version__",
    "apply",
    "cache",
    "distill",
    "evaluate",
    "load",
    "make_pairs",
    "nasa",
    "plan",
    "plug",
    "record",
]

# Importing torch and diffusers takes seconds, so the public names are imported when they are first used.
_HOMES = {
    "UserError": "fewstep.errors",
    "apply": "fewstep.export",
    "cache": "fewstep.programs.cache",
    "distill": "fewstep.eval.during",
    "evaluate": "fewstep.eval.evaluate",
    "load": "fewstep.export",
    "make_pairs": "fewstep.programs.pairs",
    "nasa": "fewstep.export",
    "plan": "fewstep.programs.planning.plan",
    "plug": "fewstep.export",
    "record": "fewstep.recording",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
