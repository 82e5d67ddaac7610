"""What rollouts, ODEs and losses ask of a network: the clean sample."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning


class Denoiser(Protocol):
    """Anything that says what the clean sample is.

    ``x_t``: (B, ...), ``t``: (B,) in [0, 1], ``conditioning``: of B samples; returns x0 (B, ...).

    ``end``: (B,) in [0, t], the time at which the step from t ends, 0 for the clean sample. It is of interest only to a
    student of two times (:mod:`fewstep.networks.flow_map`); all others ignore it. Without it there is no such step.
    """

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor: ...
