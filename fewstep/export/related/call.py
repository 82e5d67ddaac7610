"""How a relative of a student's pipeline is called: what must be filled in, and pictures to try it with."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from PIL import Image

from fewstep.export.related.classes import PICTURES, parameters, takes_control
from fewstep.recording.call.invocation import SUBJECT_ARGUMENTS

#: The argument that says how much of a picture is kept, in diffusers' word.
STRENGTH = "strength"
# The caller's business: what is sampled, from which noise, how much of it, and how it is returned.
_CALLERS = ("generator", "latents", "output_type", "return_dict", "num_inference_steps", "height", "width", STRENGTH)
_MASKS = ("mask_image", "control_mask")
#: Every value of a picture that only controls, of 255.
GREY = 128


def task_of(pipeline_class: type, own: type) -> str:
    """What a relative is for, in the words of the hub and of ``fewstep.load``.

    Args:
        pipeline_class: the relative.
        own: the student's pipeline class.
    """
    named = parameters(pipeline_class)
    if not set(_MASKS).isdisjoint(named):
        task = "inpainting"
    elif "video" in named and "image" not in named:
        task = "video-to-video"
    elif takes_control(pipeline_class) and ("control_image" not in named or "image" not in named):
        task = ""  # its one picture goes to the control network
    else:
        task = "image-to-video" if "num_frames" in parameters(own) else "image-to-image"
    return "-".join(filter(None, ("controlnet" if takes_control(pipeline_class) else "", task)))


def call_of(pipeline_class: type, own: type, call: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that make a relative run as the student was trained, pictures, prompt and strength apart.

    They are those of the student's own call, as far as it takes them, and its own class's defaults where the relative
    has others: Flux's network is told a guidance of 3.5 by one and of 7 by the other.

    Args:
        pipeline_class: the relative.
        own: the student's pipeline class.
        call: the student's own, see :class:`fewstep.export.StudentPlan`.
    """
    theirs, ours = parameters(pipeline_class), parameters(own)
    filled = {name: value for name, value in call.items() if name in theirs}
    for name, parameter in theirs.items():
        ordinary = name in ours and name not in (*filled, *_CALLERS, *SUBJECT_ARGUMENTS.values())
        if ordinary and ours[name].default != parameter.default and ours[name].default is not inspect.Parameter.empty:
            filled[name] = ours[name].default
    return filled


def default_strength(pipeline_class: type) -> float | None:
    """The strength of a bare call; None for a class that takes none."""
    parameter = parameters(pipeline_class).get(STRENGTH)
    return None if parameter is None else float(parameter.default)


def pictures(pipeline_class: type, pixels: tuple[int, ...], number: int, *, whole: bool) -> dict[str, Any]:
    """Pictures of noise for a relative's call, as PIL images, and their size where it takes one.

    Where a picture is given beside the one that controls, the latter is grey, and the same whatever the number.

    Args:
        pipeline_class: the relative.
        pixels: (C, H, W) or (C, F, H, W).
        number: another one, other pictures.
        whole: of a mask: whether it covers all of the picture, or its upper half.
    """
    named = parameters(pipeline_class)
    height, width = pixels[-2:]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: height if whole else height // 2] = 255
    arguments: dict[str, Any] = {"image": picture} if "image" in named else {}
    if "video" in named and not arguments:
        arguments["video"] = [picture] * (pixels[1] if len(pixels) == 4 else 1)
    if "control_image" in named:
        arguments["control_image"] = Image.new("RGB", (width, height), (GREY,) * 3) if arguments else picture
    arguments |= {name: Image.fromarray(mask) for name in _MASKS if name in named}
    return arguments | {name: value for name, value in (("height", height), ("width", width)) if name in named}


def picture_arguments(pipeline_class: type) -> list[str]:
    """The names of the arguments that a caller gives its pictures by."""
    named = parameters(pipeline_class)
    shown = [name for name in PICTURES if name in named and (name != "video" or "image" not in named)]
    return shown + [name for name in _MASKS if name in named]
