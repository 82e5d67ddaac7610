"""Classifier-free guidance (Ho & Salimans 2022) in diffusers' convention: neg + w (pos - neg), w = 1 is off."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning, in_groups, join
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.ode import solver_step
from fewstep.diffusion.prediction import expand, to_x0
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.experts import ExpertsDenoiser
from fewstep.networks.roles import Role
from fewstep.sending import known_too


def guide(positive: Tensor, negative: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """neg + w (pos - neg); all (B, ...). It commutes with every conversion at one x_t, so x0 may be guided directly.

    Papers that write c + w' (c - u) mean w' = w - 1.
    """
    return torch.lerp(negative, positive, guidance_scale)


def rescale_last_axis(guided: Tensor, positive: Tensor) -> Tensor:
    """``guided`` with the norm of ``positive`` along the last axis (per token); both (B, ..., C)."""
    return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def rescale_norm(guided: Tensor, positive: Tensor) -> Tensor:
    """``guided`` shrunk, never grown, to the norm of ``positive`` over the whole tensor; both (B, ...)."""
    return guided * (positive.norm() / guided.norm()).clamp(max=1.0)


def _twice(t: Tensor) -> Tensor:
    return torch.cat([t, t])


class GuidedDenoiser:
    """A denoiser under classifier-free guidance; itself a :class:`fewstep.diffusion.denoiser.Denoiser`.

    What it is led away from goes with the samples, as the further answer of their conditioning: each sample has its
    own. A network's raw outputs are combined and converted to x0 once; of any other denoiser two x0 are combined. There
    is one network call of 2B rows where the conditionings can be joined, else one for each group of equal shape; of B
    rows at scale 1 (the positive alone) and at scale 0 (the negative alone).

    Args:
        denoiser: the unguided one.
        guidance_scale: w; or one for each interval of the time.
        further: how many further answers the samples' conditionings have; 0 of a teacher without guidance.
        joint: the condition and its negative are asked in one call of 2B rows, else in two: slower, and in less memory.

    Raises:
        UserError: a scale other than 1 without a further answer.
    """

    def __init__(
        self, denoiser: Denoiser, guidance_scale: float | TimedScale, further: int = 1, joint: bool = True
    ) -> None:
        if guidance_scale != 1.0 and not further:
            wish = guidance_scale.scales if isinstance(guidance_scale, TimedScale) else guidance_scale
            raise UserError(
                f"guidance_scale={wish} needs classifier-free guidance, which this teacher lacks; "
                "set guidance_scale to 1"
            )
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.further = further
        self.joint = joint

    @property
    def calls(self) -> int:
        """Network calls per sample: 2, or 1 where one of the two has no weight."""
        return 1 if self.guidance_scale in (0.0, 1.0) else 2

    def of(self, denoiser: Denoiser) -> GuidedDenoiser:
        """Another denoiser under the same guidance."""
        return GuidedDenoiser(denoiser, self.guidance_scale, self.further, self.joint)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        end: Tensor | None = None,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Guided x0 (B, ...); by ``guidance_scale`` (B,), a w for each sample, where it is given.

        ``end`` is ignored: a student of two times has its guidance trained in.
        """
        if guidance_scale is not None:
            return self._guided(x_t, t, conditioning, expand(guidance_scale, x_t))
        if self.guidance_scale == 1.0:
            return self.denoiser(x_t, t, conditioning)
        if self.guidance_scale == 0.0:
            return self.denoiser(x_t, t, _negative(conditioning))
        return self._guided(x_t, t, conditioning, self.scale_at(t, x_t))

    def step(
        self,
        schedule: NoiseSchedule,
        x_t: Tensor,
        t: Tensor,
        then: Tensor,
        conditioning: AnyConditioning,
        solver: str,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """x (B, ...) at ``then`` (B,) after one step of its ODE; see :func:`fewstep.diffusion.ode.solver_step`."""

        def denoise(x: Tensor, time: Tensor) -> Tensor:
            return self(x, time, conditioning, guidance_scale=guidance_scale)

        return solver_step(denoise, schedule, x_t, t, then, solver)

    def scale_at(self, t: Tensor, like: Tensor) -> float | Tensor:
        """w at ``t`` (B,), as a number or shaped to multiply ``like`` (B, ...)."""
        scale = self.guidance_scale
        return scale.at(t, like) if isinstance(scale, TimedScale) else scale

    def pair(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> tuple[Tensor, Tensor]:
        """What guidance combines: x0_positive and x0_negative, (B, ...) each."""
        return self._both(self.denoiser, x_t, t, conditioning)

    def _guided(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, scale: float | Tensor) -> Tensor:
        network = self.denoiser.denoiser if isinstance(self.denoiser, Role) else self.denoiser
        if not isinstance(network, NetworkDenoiser | ExpertsDenoiser):
            return guide(*self.pair(x_t, t, conditioning), scale)

        def raw(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
            return network.raw(x_t, t, conditioning)

        positive, negative = self._both(raw, x_t, t, conditioning)
        return to_x0(positive, network.prediction_type, x_t, network.schedule, t, negative, scale)

    def _both(self, ask: Denoiser, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> tuple[Tensor, Tensor]:
        """What ``ask`` answers with the condition and with the negative, (B, ...) each."""
        if not self.joint:
            negative = in_groups(ask, x_t, t, _negative(conditioning))
            return in_groups(ask, x_t, t, conditioning), negative
        both = join([_negative(conditioning), conditioning.alone()])
        negative, positive = in_groups(ask, torch.cat([x_t, x_t]), known_too(_twice, t), both).chunk(2)
        return positive, negative


def _negative(conditioning: AnyConditioning) -> AnyConditioning:
    """What B samples are led away from."""
    if not conditioning.others:
        raise ValueError("guidance was asked for samples that have no further answer to be led away from")
    return conditioning.others[0]
