"""Classifier-free guidance (Ho & Salimans 2022) in diffusers' convention: neg + w (pos - neg), w = 1 is off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fewstep.conditioning.ragged import AnyConditioning, in_groups, join
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.ode import solver_step
from fewstep.diffusion.prediction import expand, to_velocity, to_x0
from fewstep.diffusion.rescaling import Rescaling
from fewstep.diffusion.scales import GuidanceScale
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


def _repeated(t: Tensor, count: int) -> Tensor:
    return torch.cat([t] * count)


class GuidedDenoiser:
    """A denoiser under classifier-free guidance; itself a :class:`fewstep.diffusion.denoiser.Denoiser`.

    What it is led away from goes with the samples, as the further answers of their conditioning: each sample has its
    own. With the positive answer a1, further ones a2 .. an and a scale w_k between each and the next, the guided one is
    an + sum w_k (a_k - a_(k+1)): neg + w (pos - neg) of two, u + w_t (t - i) + w_i (i - u) of three (InstructPix2Pix,
    arXiv 2211.09800, Eq. 3). An answer without weight is not asked for. A network's raw outputs are combined and
    converted to x0 once; of any other denoiser several x0 are combined. There is one network call for all answers where
    their conditionings can be joined, else one for each group of equal shape.

    Where the teacher's pipeline brings its sum to the size of the positive answer, so is the network's here.

    Args:
        denoiser: the unguided one.
        guidance_scale: w_1.
        further: how many further answers the samples' conditionings have; 0 of a teacher without guidance.
        joint: all answers are asked in one call, else in one each: slower, and in less memory.
        later: w_2 and on, of teachers with more than two answers; they stay as they are whatever w_1 is.
        rescaling: what is done to the sum of a network's answers; None: nothing.

    Raises:
        UserError: a scale other than 1 without a further answer; or rescaled guidance of what is no network's answer.
        ValueError: another number of later scales than of further answers beyond the first.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guidance_scale: GuidanceScale,
        further: int = 1,
        joint: bool = True,
        later: Sequence[float] = (),
        rescaling: Rescaling | None = None,
    ) -> None:
        if guidance_scale != 1.0 and not further:
            wish = guidance_scale if isinstance(guidance_scale, int | float) else guidance_scale.scales
            raise UserError(
                f"guidance_scale={wish} needs classifier-free guidance, which this teacher lacks; "
                "set guidance_scale to 1"
            )
        if len(later) != max(further - 1, 0):
            raise ValueError(f"{further} further answers have {max(further - 1, 0)} later scales, not {len(later)}")
        if rescaling is not None and guidance_scale != 1.0:
            _asked(denoiser, rescaling)
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.further = further
        self.joint = joint
        self.later = tuple(later)
        self.rescaling = rescaling

    @property
    def calls(self) -> int:
        """Network calls per sample: one for each answer that has a weight."""
        return len(self._weighed(self.guidance_scale))

    def of(self, denoiser: Denoiser, guidance_scale: GuidanceScale | None = None) -> GuidedDenoiser:
        """Another denoiser under the same guidance, or under another w_1."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return GuidedDenoiser(denoiser, scale, self.further, self.joint, self.later, self.rescaling)

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        end: Tensor | None = None,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Guided x0 (B, ...); by ``guidance_scale`` (B,), a w_1 for each sample, where it is given.

        ``end`` is ignored: a student of two times has its guidance trained in.
        """
        weighed = self._weighed(self.guidance_scale if guidance_scale is None else expand(guidance_scale, x_t))
        if len(weighed) == 1:
            (number,) = weighed
            return self.denoiser(x_t, t, _told(conditioning, number))
        scale = _at(next(iter(weighed.values())), t, x_t)
        if self.rescaling is not None:
            return self._rescaled(self.rescaling, x_t, t, conditioning, weighed, scale)[1]
        network = _network(self.denoiser)
        ask = self.denoiser if network is None else _as_denoiser(network.raw)
        positive, negative = self._pair(ask, x_t, t, conditioning, weighed)
        if network is None:
            return guide(positive, negative, scale)
        return to_x0(positive, network.prediction_type, x_t, network.schedule, t, negative, scale)

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
        """w_1 at ``t`` (B,), as a number or shaped to multiply ``like`` (B, ...)."""
        return _at(self.guidance_scale, t, like)

    def pair(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> tuple[Tensor, Tensor]:
        """Two x0 (B, ...) that :func:`guide` makes the guided one of at any w_1.

        Of two answers these are x0_positive and x0_negative; of more, both are moved by what the later scales add. If
        the sum is rescaled, they make it at this w_1 alone: x0_negative is then moved to where that sum leads from.
        """
        weighed = self._weighed(None)
        if self.rescaling is None or self.guidance_scale == 1.0:
            return self._pair(self.denoiser, x_t, t, conditioning, weighed)
        scale = torch.as_tensor(self.scale_at(t, x_t), dtype=x_t.dtype, device=x_t.device)
        positive, guided = self._rescaled(self.rescaling, x_t, t, conditioning, weighed, scale)
        # guide(positive, negative, w) = guided; at w = 1 any negative does.
        return positive, positive - (guided - positive) / torch.where(scale == 1, torch.ones_like(scale), scale - 1)

    def _rescaled(
        self,
        rescaling: Rescaling,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        weighed: dict[int, GuidanceScale | Tensor | None],
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What the denoiser says (B, ...) of the positive answer, and of the sum.

        The pipeline takes their sizes over all that its network says, also of entries that are known.
        """
        network, say = _asked(self.denoiser, rescaling)
        positive, negative = self._pair(_as_denoiser(network.bare), x_t, t, conditioning, weighed)
        answers = positive, rescaling(guide(positive, negative, scale), positive)
        settled = [network.settled(one, x_t, t, conditioning) for one in answers]
        first, second = (say(one, network.prediction_type, x_t, network.schedule, t) for one in settled)
        return first, second

    def _weighed(self, scale: GuidanceScale | Tensor | None) -> dict[int, GuidanceScale | Tensor | None]:
        """The answers that have a weight, by number from 0, and the scale between each of them and the next.

        ``scale``: w_1; None: any. The weight of a_k is w_k - w_(k-1), where w_0 is 0 and the last one's own is 1. A w_1
        of 1 is off, as in the pipelines: the positive alone, whatever the later scales are.
        """
        off = isinstance(scale, int | float) and scale == 1
        scales = [scale, *([1.0] * len(self.later) if off else self.later), 1.0]
        return {
            number: own
            for number, (before, own) in enumerate(zip([0.0, *scales], scales, strict=False))
            if not (isinstance(before, int | float) and isinstance(own, int | float) and before == own)
        }

    def _pair(
        self,
        ask: Denoiser,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        weighed: dict[int, GuidanceScale | Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """What ``ask`` answers to the first two that are weighed, (B, ...) each, moved by what the others add."""
        answers = self._answers(ask, x_t, t, conditioning, list(weighed))
        positive, negative = answers[:2]
        for number, scale in enumerate(list(weighed.values())[1:-1], start=1):
            assert isinstance(scale, int | float)  # as every later one is
            more = (scale - 1) * (answers[number] - answers[number + 1])
            positive, negative = positive + more, negative + more
        return positive, negative

    def _answers(
        self, ask: Denoiser, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, numbers: list[int]
    ) -> list[Tensor]:
        """What ``ask`` answers, (B, ...) each, for the conditionings of these numbers, of which 0 is the positive."""
        told = [_told(conditioning, number) for number in reversed(numbers)]
        if not self.joint:
            return [in_groups(ask, x_t, t, one) for one in told][::-1]
        count = len(told)
        both = join([one.alone() for one in told])
        said = in_groups(ask, torch.cat([x_t] * count), known_too(partial(_repeated, count=count), t), both)
        return list(said.chunk(count))[::-1]


def _network(denoiser: Denoiser) -> NetworkDenoiser | ExpertsDenoiser | None:
    """The network, or the networks, that a denoiser or a role is; None of anything else."""
    network = denoiser.denoiser if isinstance(denoiser, Role) else denoiser
    return network if isinstance(network, NetworkDenoiser | ExpertsDenoiser) else None


def _as_denoiser(ask: Callable[[Tensor, Tensor, AnyConditioning], Tensor]) -> Denoiser:
    """A network's answers in its own prediction type, asked for as x0 is."""

    def answer(x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        return ask(x_t, t, conditioning)

    return answer


def _asked(
    denoiser: Denoiser, rescaling: Rescaling
) -> tuple[NetworkDenoiser | ExpertsDenoiser, Callable[[Tensor, str, Tensor, NoiseSchedule, Tensor], Tensor]]:
    """The network whose answers are to be rescaled, and what makes of one of them what the denoiser says.

    Raises:
        UserError: it says what no single answer of a network tells.
    """
    network = _network(denoiser)
    if network is not None:
        return network, to_x0
    of = getattr(denoiser, "__self__", None)
    if isinstance(of, NetworkDenoiser) and denoiser == of.velocity:
        return of, to_velocity
    raise UserError(
        f"this teacher's guided sum is {rescaling.describe()}, which is for answers of the network itself, and "
        "this method guides others; set --guidance_scale 1, or take dmd2 or rectified_flow"
    )


def _at(scale: GuidanceScale | Tensor | None, t: Tensor, like: Tensor) -> float | Tensor:
    """A scale at ``t`` (B,), as a number or shaped to multiply ``like`` (B, ...)."""
    assert scale is not None
    return scale if isinstance(scale, int | float | Tensor) else scale.at(t, like)


def _told(conditioning: AnyConditioning, number: int) -> AnyConditioning:
    """What the network is told for one answer, of which 0 is the positive."""
    if number > len(conditioning.others):
        raise ValueError("guidance was asked for samples that have no further answer to be led away from")
    return conditioning if number == 0 else conditioning.others[number - 1]
