"""The denoiser: one network, seen as a function from (x_t, t, conditioning) to x0.

Losses and rollouts ask only for the :class:`Denoiser` protocol, which a plain function satisfies, so the same code runs
closed-form oracles and stock diffusers networks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import pins_of
from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.diffusion.prediction import expand, from_x0, to_velocity, to_x0
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.networks.features import FeatureTap
from fewstep.recording import Recipe
from fewstep.recording.rules.dtypes import network_dtype

#: Told of one call of a network: x_t (B, ...), t (B,), and whether it ends early, at a tap. What it returns is given
#: the answer (B, ...): the network's output, or the tap's features.
OnCall = Callable[[Tensor, Tensor, bool], Callable[[Tensor], None]]


class NetworkDenoiser:
    """A stock diffusers network as a :class:`Denoiser`.

    Entries of a sample that its pipeline pins are those of the picture in every clean sample, and others that the
    network is never told (``recipe.unread``: a frame in whose place it is given a picture) are 0. The answer is the one
    that says so, whatever the network says of them: no loss sees a difference there, and no critic learns any.

    Args:
        network: the teacher's network or a copy of it.
        recipe: how the teacher's pipeline calls its network.
        schedule: alpha and sigma of ``x_t``.
        prediction_type: what the network's output is, see :data:`fewstep.diffusion.prediction.KINDS`.
        autocast: dtype of the forward pass, None for the parameters' own.
        active: makes the context in which the network is this denoiser's, where several share it.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        schedule: NoiseSchedule,
        prediction_type: str,
        autocast: torch.dtype | None = None,
        active: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.network = network
        self.recipe = recipe
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.autocast = autocast
        self.active = active
        self._unread: Tensor | None = recipe.unread
        #: Whether the network is fed float times even where its pipeline rounds them.
        self.continuous = False
        #: Watches every call of the network.
        self.on_call: OnCall = _unwatched
        #: Gives the network of whole passes without gradient, where another one answers the same for less.
        self.without_gradient: Callable[[], nn.Module] | None = None
        #: Gives what is called in a network's place: itself, or its compiled form.
        self.form: Callable[[nn.Module], nn.Module] = _itself

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """The network's output in its own prediction type; shapes as in :class:`Denoiser`."""
        return self.settled(self.bare(x_t, t, conditioning), x_t, t, conditioning)

    def bare(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """What the network itself says, also of entries that are known: :meth:`raw` before it is :meth:`settled`."""
        return in_groups(self._bare, x_t, t, conditioning)

    def settled(self, answer: Tensor, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """An output (B, ...) of the network, which says of all known entries what they are."""
        known = self._known(x_t, conditioning)
        if known is None:
            return answer
        where, x0 = known
        said = from_x0(x0, self.prediction_type, x_t, self.schedule, t)
        return torch.where(where.to(answer.device), said.to(answer), answer)

    def _bare(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        answered = self.on_call(x_t, t, False)
        if self.without_gradient is None or torch.is_grad_enabled():
            with self.active():
                answer = self._run(self.network, x_t, t, conditioning)
        else:
            answer = self._run(self.without_gradient(), x_t, t, conditioning)
        answered(answer)
        return answer

    def _run(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        # The network was trained on the dtype of its weights; the sample itself stays in the losses' dtype.
        network_input = (expand(self.schedule.input_scale(t), x_t) * x_t).to(network_dtype(network))
        # A context of its own for every call: autocast caches casted weights until the context ends, and a cast made
        # under no_grad would be reused by a later pass that needs the gradient.
        autocast = torch.autocast(x_t.device.type, dtype=self.autocast, enabled=self.autocast is not None)
        with autocast:
            timestep = self.schedule.timestep(t)
            called = self.form(network)
            return self.recipe.call(called, network_input, timestep, conditioning, continuous=self.continuous)

    def _known(self, x_t: Tensor, conditioning: AnyConditioning) -> tuple[Tensor, Tensor] | None:
        """Which entries of the samples are known, and what they are when they are clean, (B, ...); None: none are."""
        pins = pins_of(conditioning)
        if self._unread is None:
            return pins
        where, x0 = self._unread_of(tuple(x_t.shape[1:])).to(x_t.device), torch.zeros_like(x_t)
        return (where, x0) if pins is None else (where | pins.where, torch.where(pins.where, pins.value.to(x0), x0))

    def _unread_of(self, shape: tuple[int, ...]) -> Tensor:
        """What the network is never told of samples of a shape; of one of several sizes it is looked up."""
        assert self._unread is not None  # as the caller saw
        other = None if self._unread.shape == shape else self.recipe.of(shape).unread
        self._unread = self._unread if other is None else other
        return self._unread

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """x0 (B, ...) in the dtype of ``x_t``; ``end`` is ignored."""
        return to_x0(self.raw(x_t, t, conditioning), self.prediction_type, x_t, self.schedule, t)

    def velocity(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """What noise - x0 is, (B, ...); ``end`` is ignored."""
        return to_velocity(self.raw(x_t, t, conditioning), self.prediction_type, x_t, self.schedule, t)

    def features(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, tap: FeatureTap) -> Tensor:
        """What ``tap`` sees on the way: (B, C, ...) maps or (B, N, C) image tokens, float32; the rest does not run."""

        def tapped(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None) -> Tensor:
            answered = self.on_call(x_t, t, True)
            with self.active(), tap.on(self.network) as seen:
                self._run(self.network, x_t, t, conditioning)
            answered(seen.features)
            return seen.features

        return in_groups(tapped, x_t, t, conditioning)


def _unwatched(_x_t: Tensor, _t: Tensor, _early: bool) -> Callable[[Tensor], None]:
    return lambda _answer: None


def _itself(network: nn.Module) -> nn.Module:
    return network
