"""The student's own samples to train on, where there are no real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.data.batch import Batch
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.rollout import Sampler, draw_sample


@torch.no_grad()
def own_sample(student: Denoiser, sampler: Sampler, batch: Batch, conditioning: AnyConditioning) -> Tensor:
    """Samples (B, ...) of the student, ended at a step that is drawn for all of them; no gradient passes through."""
    last = batch.draws.shared_integer("student_step", 0, len(sampler.grid))
    return draw_sample(student, sampler, batch.draws, batch.shape, conditioning, last, prefix="sample_")
