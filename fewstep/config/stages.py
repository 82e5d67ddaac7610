"""Stages of one run, as they are given: ``cmt:2000,mfd:8000,mft``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from fewstep.errors import UserError


def read_stages(text: str, known: Sequence[str], max_steps: int, example: str) -> dict[str, int]:
    """The first step of each stage, in their order.

    Args:
        text: of ``--stages``: each with its number of steps but the last, which lasts until ``max_steps``.
        known: the stages in their order, each of which may be left out.
        max_steps: of the run.
        example: for the errors.

    Raises:
        UserError: the stages are none, in another order, or one of them has no step.
    """
    names = ", ".join(known)
    found: list[tuple[str, int | None]] = []
    for part in text.split(","):
        read = re.fullmatch(r"\s*(\w+)\s*(?::\s*(\d+)\s*)?", part)
        if read is None or read[1] not in known:
            raise UserError(f"--stages takes such as {example} of {names}, not {part.strip()!r}")
        found.append((read[1], None if read[2] is None else int(read[2])))
    for (name, _), (then, _) in pairwise(found):
        if known.index(name) >= known.index(then):
            raise UserError(f"--stages: {then} comes before {name} or twice; their order is {names}, each once")
    starts, step = {}, 0
    for name, length in found[:-1]:
        if not length:
            raise UserError(f"--stages: {name} needs its number of steps, at least 1, such as {name}:2000")
        starts[name], step = step, step + length
    name, length = found[-1]
    starts[name] = step
    if step >= max_steps or (length is not None and step + length != max_steps):
        raise UserError(
            f"--stages: {name} begins at step {step} and lasts until --max_steps {max_steps}; "
            "give more steps, and the last stage without a number"
        )
    return starts
