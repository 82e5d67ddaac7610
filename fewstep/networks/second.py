"""The second network of a pipeline's step (a control network) beside the roles: one for all of them, never trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from fewstep.networks.in_dtype import in_dtype
from fewstep.recording import Recipe, Recording


def with_frozen_second(
    recording: Recording, dtype: torch.dtype, device: torch.device, known: dict[int, nn.Module]
) -> Recording:
    """The recording with its second network where and as roles want it; as it is where it has none.

    The pipeline's own stays what it was.

    Args:
        recording: of a teacher or a student.
        dtype: of its weights.
        device: where they lie.
        known: what has been made so far, by the number of the pipeline's own: it is added to.
    """
    second = recording.recipe.second
    if second is None:
        return recording
    if id(second.network) not in known:
        known[id(second.network)] = (
            in_dtype(copy.deepcopy(second.network).to(device), dtype).eval().requires_grad_(False)
        )

    def with_own(recipe: Recipe) -> Recipe:
        own = None if recipe.second is None else replace(recipe.second, network=known[id(second.network)])
        return replace(recipe, second=own, sizes=tuple(map(with_own, recipe.sizes)))

    return replace(recording, recipe=with_own(recording.recipe))
