"""Whether a teacher responds to its condition: one that answers a condition and its negative alike cannot be guided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.prediction import add_noise
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recording
from fewstep.recording.loop.experts import expert_at
from fewstep.recording.pipeline import evaluating

# Two answers that differ by less, relative to their size, are the same up to rounding.
_SAME = 1e-5
_TIMES = (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def refuse_unresponsive(recording: Recording, conditions: Sequence[AnyConditioning], noise: Tensor) -> None:
    """Raise where the teacher answers each of its conditions as it does that one's own negative.

    Guidance-distilled teachers may do so. A network that answers nothing but zeros is untrained, and passes: the proof
    of its recording has warned of it.

    Args:
        recording: of the teacher.
        conditions: of one sample each, with its further answers.
        noise: (2, ...) unit normal; noise and a clean sample are made of it.

    Raises:
        UserError: no condition changes the answer at any time.
    """
    schedule = recording.schedule
    for t in _TIMES:
        time = schedule.snap(torch.full((1,), t, dtype=torch.float64, device=noise.device))
        network = expert_at(recording.experts, float(schedule.timestep(time))).network
        denoiser = NetworkDenoiser(network, recording.recipe, schedule, recording.prediction_type)
        x_t = add_noise(noise[:1], noise[1:], schedule.coefficients(time))
        with evaluating(network):
            pairs = [[denoiser.raw(x_t, time, told) for told in (one, one.others[-1])] for one in conditions]
        if any(a.abs().max() == 0 or (a - without).abs().max() > _SAME * a.abs().max() for a, without in pairs):
            return
    raise UserError(
        "this teacher answers the same with and without its condition, as guidance-distilled models may: guidance "
        "would change nothing; use --guidance_scale 1"
    )
