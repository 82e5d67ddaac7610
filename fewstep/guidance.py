"""Classifier-free guidance (Ho & Salimans 2022) in diffusers' convention: neg + w (pos - neg), w = 1 is off."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning import Conditioning
from fewstep.denoiser import Denoiser, NetworkDenoiser
from fewstep.errors import UserError
from fewstep.prediction import add_noise

# Two answers that differ by less, relative to their size, are the same up to rounding.
_DEAF = 1e-5
_LISTENING_TIMES = (0.25, 0.5, 0.75, 1.0)


def guide(positive: Tensor, negative: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """neg + w (pos - neg); all (B, ...). It commutes with every conversion at one x_t, so x0 may be guided directly.

    Papers that write c + w' (c - u) mean w' = w - 1.
    """
    return negative + guidance_scale * (positive - negative)


def rescale_last_axis(guided: Tensor, positive: Tensor) -> Tensor:
    """``guided`` with the norm of ``positive`` along the last axis (per token); both (B, ..., C)."""
    return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def rescale_norm(guided: Tensor, positive: Tensor) -> Tensor:
    """``guided`` shrunk, never grown, to the norm of ``positive`` over the whole tensor; both (B, ...)."""
    return guided * (positive.norm() / guided.norm()).clamp(max=1.0)


class GuidedDenoiser:
    """A denoiser under classifier-free guidance; itself a :class:`fewstep.denoiser.Denoiser`.

    One network call of 2B rows where the conditionings can be joined, two calls of B rows elsewhere.

    Args:
        denoiser: the unguided one.
        negative: conditioning of one sample, used for every sample of a batch; None where the scale is 1.
        guidance_scale: w.

    Raises:
        UserError: a scale other than 1 without a negative conditioning.
    """

    def __init__(self, denoiser: Denoiser, negative: Conditioning | None, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and negative is None:
            raise UserError(
                f"guidance_scale={guidance_scale} needs classifier-free guidance, which this teacher lacks; "
                "set guidance_scale to 1"
            )
        self.denoiser = denoiser
        self.negative = negative
        self.guidance_scale = guidance_scale

    @property
    def calls(self) -> int:
        """Network calls per sample: 2, or 1 where guidance is off."""
        return 1 if self.guidance_scale == 1.0 else 2

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Guided x0 (B, ...)."""
        if self.guidance_scale == 1.0:
            return self.denoiser(x_t, t, conditioning)
        batch = x_t.shape[0]
        negative = self.negative.select([0] * batch)
        if Conditioning.compatible(negative, conditioning):
            both = Conditioning.cat([negative, conditioning])
            x0_negative, x0_positive = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        else:
            x0_negative = self.denoiser(x_t, t, negative)
            x0_positive = self.denoiser(x_t, t, conditioning)
        return guide(x0_positive, x0_negative, self.guidance_scale)


@torch.no_grad()
def refuse_deaf(
    teacher: NetworkDenoiser, negative: Conditioning, conditioning: Conditioning, noise: Tensor, guidance_scale: float
) -> None:
    """Raise where the teacher answers its conditions and its negative alike, so that no guidance moves it.

    Guidance-distilled teachers may do so. A network that answers nothing but zeros is untrained, and passes: the proof
    of its recording has warned of it.

    Args:
        teacher: unguided.
        negative: of one sample.
        conditioning: of the B samples that are listened to, one at a time.
        noise: (2, ...) unit normal; noise and a clean sample are made of it.
        guidance_scale: the run's, for the message.

    Raises:
        UserError: no condition changes the answer at any time.
    """
    for t in _LISTENING_TIMES:
        time = teacher.schedule.snap(torch.full((1,), t, dtype=torch.float64, device=noise.device))
        x_t = add_noise(noise[:1], noise[1:], teacher.schedule.coefficients(time))
        without = teacher.raw(x_t, time, negative)
        for row in range(conditioning.batch_size):
            answer = teacher.raw(x_t, time, conditioning.select([row]))
            size = answer.abs().max()
            if size == 0 or (answer - without).abs().max() > _DEAF * size:
                return
    raise UserError(
        f"this teacher answers the same with and without its condition, as guidance-distilled models may: a guidance "
        f"of {guidance_scale:g} would change nothing; use --guidance_scale 1"
    )
