"""What the model card says of the student's scheduler in a user's hands: seeds, and other samplers on its grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from fewstep.export.walk.sizes import size_text
from fewstep.recording.pipeline import find_scheduler

# Samplers that people swap in, all of one network call a step.
_SAMPLERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DDPMScheduler",
    "TCDScheduler",
    "LCMScheduler",
)


def generator_lines(about: Mapping[str, Any], pipeline: Any) -> list[str]:
    """The lines of stock code that make ``generator``, and give it to a scheduler that its pipeline forgets."""
    lines = ["generator = torch.Generator().manual_seed(0)"]
    if about["noise_follows"] == "global seed":
        step = f"pipe.{find_scheduler(pipeline)}.step"
        lines.append(f"{step} = functools.partial({step}, generator=generator)  # the noise between the steps")
    return lines


def seeds(about: Mapping[str, Any], pipeline: Any) -> str:
    """Which seed makes which image."""
    if about["renoise"] == "ode":
        return "No noise is drawn between the steps: the image depends on the initial noise alone, so on `generator`."
    if about["noise_follows"] is None:
        return "One step draws no noise after the initial one: the image depends on `generator` alone."
    several = (
        "For several images give a list with a generator for each: every image is then the one that its generator "
        "makes alone. One generator for all of them makes other images than one at a time."
    )
    if about["noise_follows"] == "generator":
        return f"Fresh noise is drawn between the steps, from `generator`: one seed gives one image. {several}"
    step = f"pipe.{find_scheduler(pipeline)}.step"
    return (
        "Fresh noise is drawn between the steps. This pipeline does not pass `generator` on to its scheduler, so that "
        f"noise would follow torch's global seed: the line with `functools.partial` above gives `{step}` the "
        f"generator, and is repeated for another one. `fewstep.load` does it in every call. {several}"
    )


def impossible_counts(about: Mapping[str, Any], pipeline: Any) -> str:
    """The step count at which the scheduler has no grid; empty where there is none."""
    config = getattr(pipeline, find_scheduler(pipeline)).config
    if 1 in about["counts"] or not config.get("shift_terminal"):
        return ""
    return (
        "Not at one step: the scheduler's grid is stretched to end at a certain time, which with a single one is 0/0, "
        "and the image is NaN. `fewstep.load` refuses it."
    )


def sizes(about: Mapping[str, Any]) -> str:
    """What the student does at other sizes than the trained one; empty where its teacher does nothing special there."""
    if "dynamic_shift" not in about:
        return ""
    kept, rows = about["dynamic_shift"]["kept"], about["dynamic_shift"]["sizes"]
    trained = size_text(_size(rows[0]))
    if kept:
        text = (
            "The teacher shifts its times by the size of the sample, and this student's scheduler does the same. It "
            f"was trained at the times of {trained}; at another size the network is asked at times that it was not "
            "trained at. These sizes were seen to do what is meant:"
        )
        lines = ["| size | shift | times t |", "| --- | --- | --- |"]
        lines += [
            f"| {size_text(_size(row))} | {row['teacher_shift']:.4g} | {', '.join(f'{t:.4g}' for t in row['grid'])} |"
            for row in rows
        ]
    else:
        shift = about["dynamic_shift"]["shift"]
        text = (
            "The teacher shifts its times by the size of the sample. This student's scheduler is static: it has the "
            f"times above, of the shift {shift:.4g}, at every size. It was trained at {trained}; at another size it "
            "runs, at other times than its teacher would there."
        )
        lines = ["| size | the teacher's shift | the student's |", "| --- | --- | --- |"]
        lines += [f"| {size_text(_size(row))} | {row['teacher_shift']:.4g} | {shift:.4g} |" for row in rows]
    return f"{text}\n\n" + "\n".join(lines)


def _size(row: Mapping[str, Any]) -> dict[str, int]:
    return {name: row[name] for name in ("height", "width", "num_frames") if name in row}


def samplers(about: Mapping[str, Any], pipeline: Any) -> str:
    """Which samplers land on the trained grid when they are made of the student's scheduler; empty where none is known.

    They are made and asked, here and now.
    """
    scheduler = getattr(pipeline, find_scheduler(pipeline))
    if scheduler.config.get("trained_betas") is None:
        return ""
    # As a user gets it from the folder: there, what is written is no default.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    landing = []
    for name in _SAMPLERS:
        if name == type(scheduler).__name__:
            continue
        other = getattr(diffusers, name).from_config(dict(config))
        other.set_timesteps(about["steps"])
        if [float(timestep) for timestep in other.timesteps] == [float(timestep) for timestep in about["timesteps"]]:
            landing.append(f"`{name}`")
    if not landing:
        return ""
    return (
        f"Other samplers, made by `from_config(pipe.{find_scheduler(pipeline)}.config)`, that visit the same times at "
        f"{about['steps']} steps: {', '.join(landing)}. They move otherwise between these times than the student was "
        "trained to."
    )
