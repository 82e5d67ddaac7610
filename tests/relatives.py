"""A student's relatives with their real networks: what the card promises of each, and what each then does."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image

from fewstep.export.about import student_class
from fewstep.export.card.card import PLACEHOLDER
from fewstep.export.card.related import related_section
from fewstep.export.related.call import pictures
from fewstep.export.related.classes import CONTROL, made_of, text_unrepaired
from fewstep.export.related.stubs import StandIns
from fewstep.export.related.walk import walk_relatives
from fewstep.export.walk.plan import StudentPlan
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_scheduler, with_parts

#: The strengths that users try.
STRENGTHS = (0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True)
class Promise:
    """A row of a card's table: what is done at a number of steps between two strengths."""

    steps: int
    strength: str
    calls: str
    time: str

    def holds(self, strength: float) -> bool:
        """Whether the row is about this strength."""
        if found := re.fullmatch(r"(from|above) (\S+) to (below )?(\S+)", self.strength):
            low, high = float(found[2]), float(found[4])
            above = strength >= low if found[1] == "from" else strength > low
            return above and (strength < high if found[3] else strength <= high)
        return self.strength == "takes none" or float(self.strength) == strength


def about_of(recording: Recording, plan: StudentPlan) -> dict[str, Any]:
    """What of ``fewstep.json`` is about relatives."""
    own = {"pipeline": type(recording.pipeline).__name__, "call": plan.call, "counts": list(plan.counts)}
    return {**own, "renoise": plan.renoise, "related": walk_relatives(recording, plan)}


def promises(about: dict[str, Any]) -> dict[str, list[Promise]]:
    """The rows of the card's tables by pipeline class, read from its text."""
    text = related_section(about, PLACEHOLDER) or ""
    found: dict[str, list[Promise]] = {}
    for names, rows in re.findall(r"^(`.*\)):\n\n\| steps .*\n\| ---.*\n((?:\|.*\n?)+)", text, re.MULTILINE):
        cells = (re.split(r" *\| *", row)[1:5] for row in rows.split("\n") if row)
        table = [Promise(int(steps), *rest) for steps, *rest in cells]
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), table)
    return found


def real(recording: Recording, plan: StudentPlan, name: str, about: dict[str, Any]) -> Any:
    """The relative as ``fewstep.load`` makes it, of the recording's own networks and, for ControlNet, a new one."""
    kind = getattr(diffusers, name)
    student = with_parts(recording.pipeline, **{find_scheduler(recording.pipeline): plan.scheduler})
    pipeline = made_of(student, kind)
    if hasattr(pipeline, CONTROL):
        # It brings its picture to the size of the latents, a halving for each of these but the first.
        halvings = (8,) * (int(math.log2(pipeline.vae_scale_factor)) + 1)
        made = type(pipeline.controlnet).from_unet(recording.network, conditioning_embedding_out_channels=halvings)
        pipeline.register_modules(**{CONTROL: made})
    pipeline.__class__ = student_class(kind, about)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shown(recording: Recording, kind: type, number: int = 1) -> dict[str, Any]:
    """Pictures for a call of the class, at the recorded size."""
    return pictures(kind, StandIns.of(recording).pixels, number, whole=False)


def run(pipeline: Any, component: str, **call: Any) -> tuple[int, float, torch.Tensor]:
    """Call the pipeline; how often it called its network, its first timestep, and the latents at its end."""
    scheduler, seen, calls = getattr(pipeline, find_scheduler(pipeline)), [], []
    step = type(scheduler).step

    def watched(self: Any, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(float(timestep))
        return step(self, model_output, timestep, *args, **kwargs)

    watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined] - pipelines look what it takes
    hook = getattr(pipeline, component).register_forward_pre_hook(lambda *_: calls.append(1))
    type(scheduler).step = watched
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(), text_unrepaired(type(pipeline).__mro__[1]):
            torch.manual_seed(1)
            result = pipeline(**call, generator=generator, output_type="latent")
    finally:
        type(scheduler).step = step
        hook.remove()
    latents = result[0]
    return len(calls), seen[0], latents if isinstance(latents, torch.Tensor) else torch.stack(list(latents))


def picture(size: int, seed: int = 0) -> Image.Image:
    """A square picture of noise."""
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())
