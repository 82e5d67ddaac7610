"""How far apart two draws of what a pipeline draws for an item are, in its network's answer."""

from __future__ import annotations

import torch

from fewstep.recording.pipeline import evaluating
from fewstep.recording.recorded import Recorded


@torch.no_grad()
def effect_of_draws(recording: Recorded) -> float | None:
    """The difference of the network's answers to noise at half time, told two draws of the recorded item, relative.

    None where the pipeline draws nothing of what its network is told.
    """
    if recording.told is None or not recording.told.draws:
        return None
    item, network = recording.invocation.item, recording.network
    x = torch.randn(1, *recording.sample_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(next(network.parameters()).device, recording.dtype)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    t = recording.schedule.timestep(half)
    x = x * (recording.schedule.coefficients(half).sigma * recording.schedule.input_scale(half)).to(x)
    with evaluating(network):
        one, other = (
            recording.recipe.call(network, x, t, recording.draw_each([item], seed)[0].to(x.device), next_timestep=t / 2)
            for seed in (0, 1)
        )
    return float((one - other).double().norm() / one.double().norm())
