"""Flow maps: networks that are told a second time r <= t and say the average velocity between both.

The average velocity is (y_t - y_r) / (tau_t - tau_r) in rectified flow's coordinates y = x_t / (alpha + sigma) and
tau = sigma / (alpha + sigma), which every family of schedules has. A network that says it in its own prediction type is
moved by a stock scheduler's ODE step from t to r, and nothing but the second time is new to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.ragged import AnyConditioning, in_groups
from fewstep.diffusion.prediction import expand, to_velocity, to_x0
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.derivative import derivative_along

#: The name of the added module, in a role and in a student's pipeline.
SECOND_TIME = "second_time"


def gap(schedule: NoiseSchedule, t: Tensor, r: Tensor) -> Tensor:
    """tau_t - tau_r (B,), float64; r = 0 is the clean sample in every family."""
    return schedule.flow_time(t) - torch.where(r > 0, schedule.flow_time(r.clamp(min=0)), 0.0)


def flow_direction(x_t: Tensor, velocity: Tensor, t: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """How x_t (B, ...) and t (B,) change along the flow, per unit of tau; ``velocity`` (B, ...) is noise - x0."""
    (alpha, sigma), (alpha_rate, sigma_rate) = schedule.coefficients(t), schedule.derivatives(t)
    size = alpha + sigma
    t_change = size**2 / (sigma_rate * alpha - sigma * alpha_rate)
    # x_t = size * y, and dy / dtau is the velocity.
    x_change = expand((alpha_rate + sigma_rate) / size * t_change, x_t) * x_t + expand(size, x_t) * velocity
    return x_change, t_change


class FlowMapDenoiser(NetworkDenoiser):
    """A :class:`fewstep.networks.denoiser.NetworkDenoiser` that is also told where its step ends.

    Args:
        base: of the network alone.
        second_time: of :mod:`fewstep.pipelines.flow_map`.
    """

    def __init__(self, base: NetworkDenoiser, second_time: nn.Module) -> None:
        super().__init__(base.network, base.recipe, base.schedule, base.prediction_type, base.autocast, base.active)
        self.second_time: Any = second_time  # of a class that lies in a file of pipelines/
        #: Float times even for a network that was recorded with integers: their derivative is wanted.
        self.continuous = any(not getattr(torch, rule.dtype).is_floating_point for rule in _times(base.recipe))
        self._gap: Tensor | None = None

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """As in :class:`fewstep.networks.denoiser.NetworkDenoiser`; ``end`` (B,) in [0, t] is r, by default t itself.

        Raises:
            ValueError: r > t. (On a GPU this is not looked at, as the host would have to wait.)
        """
        return self.settled(self.bare(x_t, t, conditioning, end), x_t, t, conditioning)

    def bare(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """As in :class:`fewstep.networks.denoiser.NetworkDenoiser`; ``end`` and errors as of :meth:`raw`."""
        if end is not None and type(t) is Tensor and t.device.type == "cpu" and bool((end > t).any()):
            raise ValueError(f"the second time r is at most t, not {end.tolist()} at {t.tolist()}")
        return in_groups(self._between, x_t, t, conditioning, end)

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """What the end of a walk's step is mixed of: x0 (B, ...) such that an ODE step to ``end`` is right.

        Where the student's walks tell it another end, it is right to that one.
        """
        if end is not None:
            end = self.second_time.end(t, end)
        return to_x0(self.raw(x_t, t, conditioning, end), self.prediction_type, x_t, self.schedule, t)

    def velocity(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """The average velocity (B, ...) between ``end``, by default t itself, and t."""
        return to_velocity(self.raw(x_t, t, conditioning, end), self.prediction_type, x_t, self.schedule, t)

    def later_velocity(
        self,
        x_t: Tensor,
        t: Tensor,
        conditioning: AnyConditioning,
        end: Tensor,
        direction: Tensor,
        distance: Tensor,
    ) -> Tensor:
        """The average velocity (B, ...) between ``end`` and s, at the x_s to which ``direction`` leads from ``x_t``.

        Args:
            x_t: (B, ...).
            t: (B,).
            conditioning: of B samples.
            end: (B,), at most s.
            direction: a velocity (B, ...).
            distance: flow time (B,) from s to t.
        """
        alpha, sigma = self.schedule.coefficients(t)
        y = x_t / expand(alpha + sigma, x_t) - expand(distance, x_t) * direction
        s = torch.maximum(self.schedule.time_from_flow_time(self.schedule.flow_time(t) - distance), end)
        alpha, sigma = self.schedule.coefficients(s)
        return self.velocity(y * expand(alpha + sigma, y), s, conditioning, end)

    def velocity_and_derivative(
        self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor, direction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """u (B, ...), and d u / d tau (B, ...) along the velocity ``direction`` (B, ...), r held: MeanFlow, Eq. 8.

        Both in one pass; only u has a graph (:func:`fewstep.networks.derivative.derivative_along`).
        """

        def average_velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return self.velocity(x_t, t, conditioning, end)

        change = flow_direction(x_t, direction, t, self.schedule)
        return derivative_along(average_velocity, (x_t, t), change, self.network)

    def reenter(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes the context of the pass that runs now, for a block that is run again in the backward pass."""
        told = self._gap
        return nullcontext if told is None else lambda: self._told(told)

    def told(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, told: Tensor) -> Tensor:
        """The network's output (B, ...) where its second time is told these numbers (B,), a gap or another's sign."""
        return self.settled(self._bare_told(x_t, t, conditioning, told), x_t, t, conditioning)

    def _between(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None) -> Tensor:
        return self._bare_told(x_t, t, conditioning, gap(self.schedule, t, t if end is None else end))

    def _bare_told(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, told: Tensor) -> Tensor:
        with self._told(told):
            return self._bare(x_t, t, conditioning)

    @contextmanager
    def _told(self, told: Tensor) -> Iterator[None]:
        before, self._gap = self._gap, told
        try:
            with self.second_time.on(self.network, lambda: told) if before is None else nullcontext():
                yield
        finally:
            self._gap = before


class FlowMapRecipe:
    """The recipe of a network with a second time, by which an exported pipeline is compared with the trained network.

    Args:
        recipe: of the network alone.
        schedule: of both times.
        second_time: as in :class:`FlowMapDenoiser`.
    """

    def __init__(self, recipe: Any, schedule: NoiseSchedule, second_time: nn.Module) -> None:
        self._recipe, self._schedule = recipe, schedule
        self._second_time: Any = second_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recipe, name)

    def calling(self, networks: Mapping[str, nn.Module]) -> FlowMapRecipe:
        """That of another second time of the same kind: in a student's files it has the dtype of the others there."""
        return FlowMapRecipe(self._recipe, self._schedule, networks.get(SECOND_TIME, self._second_time))

    def call(
        self,
        network: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        *,
        next_timestep: Tensor,
        continuous: bool = False,
    ) -> Tensor:
        """As :meth:`fewstep.recording.Recipe.call`."""
        t, r = self._schedule.time(timestep), self._schedule.time(next_timestep)
        told = gap(self._schedule, t, self._second_time.end(t, torch.where(r < 1e-9, 0.0, r)))
        with self._second_time.on(network, lambda: told):
            return self._recipe.call(network, x, timestep, conditioning, continuous=continuous)


def _times(recipe: Any) -> tuple[Any, ...]:
    return getattr(recipe, "times", ())
