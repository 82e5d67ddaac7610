"""A student at other sizes than the trained one, where its teacher shifts its times by the size of the sample.

The student's scheduler is static, its times are the trained ones at every size; or it keeps the teacher's dynamic
shift, where that was seen to be right at several sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fewstep.diffusion.timesteps import even_grid
from fewstep.export.errors import ExportError, SchedulerCheckError
from fewstep.export.walk.check import SchedulerCheck
from fewstep.export.walk.teacher_shift import shifts_by_size, teacher_config, teacher_shift

if TYPE_CHECKING:
    from fewstep.recording import Recording

# What a pipeline reads of its scheduler's config to make a shift of a size.
_DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
# Of height and width; the recorded size comes first.
_FACTORS = ((1, 1), (0.5, 0.5), (2, 1))


@dataclass(frozen=True)
class SizeShift:
    """The shift at a size.

    Attributes:
        size: height and width, and num_frames of a video; empty where the recorded size goes by no such arguments.
        shift: k of the grid t' = k t / (1 + (k - 1) t) that the teacher's pipeline asks for there.
        grid: the student's times there, where its scheduler follows; None where it is static.
    """

    size: dict[str, int]
    shift: float
    grid: tuple[float, ...] | None = None


def dynamic_config(recording: Recording) -> dict[str, Any]:
    """What the student's scheduler has to keep of the teacher's to be asked for the same shift at every size.

    Raises:
        ExportError: the teacher's shift does not depend on the size.
    """
    if not shifts_by_size(recording):
        raise ExportError("dynamic_shift keep: this teacher does not shift its times by the size; leave it out")
    config = teacher_config(recording)
    return {name: config[name] for name in _DYNAMIC if name in config}


def size_shifts(recording: Recording, steps: int | None = None) -> tuple[SizeShift, ...]:
    """The teacher's shift at the recorded size and at a few others; nothing for one that does not depend on it.

    Args:
        recording: of the teacher.
        steps: of the grid; None: as many as the teacher makes by itself.
    """
    if not shifts_by_size(recording):
        return ()
    try:
        own = teacher_shift(recording, steps=steps)
    except ExportError:  # a grid that no shift describes: the student has the one that was stated, at every size
        return ()
    size = _recorded_size(recording)
    if size is None or _shift_at(recording, size, steps) != own:
        return (SizeShift({}, own),)
    found = [SizeShift(size, own)]
    for height, width in _FACTORS[1:]:
        other = {**size, "height": round(size["height"] * height), "width": round(size["width"] * width)}
        if _fits(recording, other) and (shift := _shift_at(recording, other, steps)) is not None:
            found.append(SizeShift(other, shift))
    return tuple(found)


def walked_sizes(
    shifts: tuple[SizeShift, ...], steps: int, walk_at: Callable[[Mapping[str, int]], SchedulerCheck]
) -> tuple[SizeShift, ...]:
    """The sizes with the grids that a dynamic scheduler was seen to visit there.

    Args:
        shifts: of :func:`size_shifts`.
        steps: of the student.
        walk_at: walks the student's pipeline at a size.

    Raises:
        SchedulerCheckError: a walk does not hold, or is on another grid than that of the size's shift.
    """
    if len(shifts) < 2:
        raise SchedulerCheckError("its sizes cannot be told: state height and width (--call)")
    walked = []
    for one in shifts:
        try:
            grid = walk_at(one.size).grid
        except SchedulerCheckError as error:
            raise SchedulerCheckError(f"at {size_text(one.size)}, {error}") from error
        wanted = even_grid(steps, one.shift).tolist()
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(grid, wanted, strict=True)):
            listed = ", ".join(f"{t:.4g}" for t in grid)
            raise SchedulerCheckError(f"at {size_text(one.size)} the pipeline makes its own grid ({listed})")
        walked.append(replace(one, grid=grid))
    return tuple(walked)


def size_text(size: Mapping[str, int]) -> str:
    """A size in words: height x width, and frames where there are some."""
    if not size:
        return "the recorded size"
    frames = f", {size['num_frames']} frames" if "num_frames" in size else ""
    return f"{size['height']}x{size['width']}{frames}"


def _recorded_size(recording: Recording) -> dict[str, int] | None:
    """The recorded size by the call's arguments; None where they do not name one."""
    pipeline, invocation = recording.pipeline, recording.invocation
    names = [name for name in ("height", "width", "num_frames") if name in invocation.parameters]
    size: dict[str, Any] = {name: invocation.default(name) for name in names}
    if not {"height", "width"} <= size.keys():
        return None
    # What diffusers' pipelines take where no size is given.
    side, scale = getattr(pipeline, "default_sample_size", None), getattr(pipeline, "vae_scale_factor", None)
    if isinstance(side, int) and isinstance(scale, int):
        size |= {name: side * scale for name in ("height", "width") if size[name] is None}
    return size if all(isinstance(value, int) for value in size.values()) else None


def _fits(recording: Recording, size: Mapping[str, int]) -> bool:
    """Whether height and width are whole patches of latents; pipelines round others, or refuse them."""
    scale = getattr(recording.pipeline, "vae_scale_factor", None)
    patch = 2 * scale if isinstance(scale, int) else 32
    return size["height"] % patch == size["width"] % patch == 0


def _shift_at(recording: Recording, size: Mapping[str, int], steps: int | None) -> float | None:
    try:
        return teacher_shift(recording, size, steps=steps)
    except Exception:  # whatever a pipeline raises at a size that it does not take: the size is not one of its own
        return None
