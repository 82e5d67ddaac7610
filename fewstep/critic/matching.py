"""What a variant of distribution matching is: a function from the student's sample to the gradient there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fewstep.data.batch import Batch

#: The gradient (B, ...) at a student's sample, and what to log.
Matched = tuple[Tensor, dict[str, Tensor]]
#: Of ``x0`` (B, ...), the batch, and the time at which the student was called for that sample.
Matching = Callable[[Tensor, Batch, float], Matched]


def matching_log(loss: Tensor) -> dict[str, Tensor]:
    """The loss () whose gradient a matching is, and the root of the gradient's mean square, for the log."""
    return {"student/matching": loss, "student/gradient": (2 * loss).sqrt()}
