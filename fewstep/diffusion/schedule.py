"""Noise schedules: how much signal and how much noise a noised sample holds at time t.

Every family is written as ``x_t = alpha(t) * x0 + sigma(t) * noise`` with t in [0, 1], 0 = data and 1 = noise. Times
and coefficients are float64 tensors of shape (B,); they meet the samples' own dtype only in
:mod:`fewstep.diffusion.prediction`.

A schedule also knows what its family calls a time: ``timestep(t)`` is the number a diffusers scheduler of that family
puts into ``scheduler.timesteps``. What the *network* is then fed is the recipe's business (:mod:`fewstep.recording`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Signal and noise coefficient, each float64 of shape (B,): ``x_t = alpha * x0 + sigma * noise``."""

    alpha: Tensor
    sigma: Tensor


class NoiseSchedule(ABC):
    """One family's alpha(t) and sigma(t), their derivatives and the names its scheduler gives to times."""

    #: Number of discrete times of the family, None where the network is fed a continuous time.
    num_train_timesteps: int | None = None

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Alpha and sigma at ``t`` (B,) in [0, 1]."""

    @abstractmethod
    def derivatives(self, t: Tensor) -> Coefficients:
        """d alpha / dt and d sigma / dt at ``t`` (B,)."""

    @abstractmethod
    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """The t (B,) at which 2 log(alpha / sigma) equals ``log_snr`` (B,)."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """The diffusers scheduler's timestep at ``t``; both (B,), float64."""

    @abstractmethod
    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of :meth:`timestep`; both (B,), float64."""

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma) at ``t`` (B,)."""
        alpha, sigma = self.coefficients(t)
        return 2 * (alpha.log() - sigma.log())

    def flow_time(self, t: Tensor) -> Tensor:
        """sigma / (alpha + sigma) at ``t``: the rectified-flow time of equal signal-to-noise ratio; both (B,).

        x_t / (alpha + sigma) = (1 - flow_time) x0 + flow_time noise: in these coordinates every family's path is the
        straight line of rectified flow, walked at another speed.
        """
        alpha, sigma = self.coefficients(t)
        return sigma / (alpha + sigma)

    def time_from_flow_time(self, flow_time: Tensor) -> Tensor:
        """The inverse of :meth:`flow_time`; both (B,). 1 is beyond a family that never reaches pure noise."""
        flow_time = flow_time.double()
        return self.time_from_log_snr(2 * (torch.log1p(-flow_time) - flow_time.log()))

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time at which the network was trained; (B,). ``t`` itself unless the family has a table."""
        return t

    def after(self, t: float) -> float:
        """The nearest noisier time that may be asked for: the next entry of a table, elsewhere a thousandth further."""
        return t + 1e-3

    def input_scale(self, t: Tensor) -> Tensor:
        """What x_t (as the schedule defines it) is multiplied with before the network sees it; (B,)."""
        return torch.ones_like(t, dtype=torch.float64)

    def initial_scale(self) -> float:
        """What unit noise is multiplied with to give the student's first x_t. Pure noise unless the family says so."""
        return 1.0


class TableSchedule(NoiseSchedule):
    """A table of K cumulative products (DDPM, Ho et al. 2020, Eq. 4): alpha^2 = abar_k, t = (k + 1) / K.

    Between two entries the angle atan2(sigma, alpha) is linear, which is finite down to a zero terminal SNR and exact
    at the entries; t = 0 is the clean sample.

    Args:
        alphas_cumprod: shape (K,), descending, in [0, 1].
    """

    num_train_timesteps: int

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.detach().double().cpu()
        self.num_train_timesteps = len(self.alphas_cumprod)
        angle = torch.atan2((1 - self.alphas_cumprod).sqrt(), self.alphas_cumprod.sqrt())
        self._angle = torch.cat([torch.zeros(1, dtype=torch.float64), angle])
        self._on = {self._angle.device: self._angle}  # a copy at each call would let a GPU's queue run dry

    def _angle_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        knots = self._knots(t.device)
        position = t.double() * self.num_train_timesteps
        # A time that is an entry up to rounding is that entry, so that alpha and sigma are the table's own numbers.
        # (The difference is detached, or at an entry nothing would change with the time.)
        nearest = position.round()
        entry = position + (nearest - position).detach()
        position = torch.where((position - nearest).abs() < 1e-6, entry, position)
        left = position.floor().long().clamp(0, self.num_train_timesteps - 1)
        slope = knots[left + 1] - knots[left]
        return torch.lerp(knots[left], knots[left + 1], position - left), slope * self.num_train_timesteps

    def _knots(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._angle.to(device, non_blocking=True)
        return self._on[device]

    def coefficients(self, t: Tensor) -> Coefficients:
        angle, _ = self._angle_and_slope(t)
        return Coefficients(angle.cos(), angle.sin())

    def derivatives(self, t: Tensor) -> Coefficients:
        angle, slope = self._angle_and_slope(t)
        return Coefficients(-angle.sin() * slope, angle.cos() * slope)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan(torch.exp(-log_snr.double() / 2))
        knots = self._knots(angle.device)
        right = torch.searchsorted(knots, angle).clamp(1, self.num_train_timesteps)
        fraction = (angle - knots[right - 1]) / (knots[right] - knots[right - 1])
        return (right - 1 + fraction.clamp(0, 1)) / self.num_train_timesteps

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * self.num_train_timesteps - 1

    def time(self, timestep: Tensor) -> Tensor:
        return (timestep.double() + 1) / self.num_train_timesteps

    def snap(self, t: Tensor) -> Tensor:
        k = (t.double() * self.num_train_timesteps).round().clamp(1, self.num_train_timesteps)
        return k / self.num_train_timesteps

    def after(self, t: float) -> float:
        return (math.floor(t * self.num_train_timesteps + 1e-6) + 1) / self.num_train_timesteps


class FlowSchedule(NoiseSchedule):
    """Flow matching (Lipman et al. 2023; rectified flow): alpha = 1 - t, sigma = t, timestep = scale * t."""

    def __init__(self, timestep_scale: float = 1000.0) -> None:
        self.timestep_scale = timestep_scale

    def coefficients(self, t: Tensor) -> Coefficients:
        t = t.double()
        return Coefficients(1 - t, t)

    def derivatives(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t, dtype=torch.float64)
        return Coefficients(-one, one)

    def time_from_flow_time(self, flow_time: Tensor) -> Tensor:
        return flow_time.double()

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * self.timestep_scale

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.double() / self.timestep_scale


class EDMSchedule(NoiseSchedule):
    """Karras et al. 2022 (EDM), Eq. 5: alpha = 1, sigma on the Karras ramp, t = position on the ramp.

    sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho; timestep = ln(sigma) / 4 (Table 1).
    The network is fed x_t / sqrt(sigma^2 + sigma_data^2).
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, sigma_data: float = 0.5
    ) -> None:
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = sigma_min, sigma_max, rho, sigma_data
        self._low = sigma_min ** (1 / rho)
        self._range = sigma_max ** (1 / rho) - self._low

    def coefficients(self, t: Tensor) -> Coefficients:
        sigma = (self._low + t.double() * self._range) ** self.rho
        return Coefficients(torch.ones_like(sigma), sigma)

    def derivatives(self, t: Tensor) -> Coefficients:
        d_sigma = self.rho * self._range * (self._low + t.double() * self._range) ** (self.rho - 1)
        return Coefficients(torch.zeros_like(d_sigma), d_sigma)

    def time_from_sigma(self, sigma: Tensor) -> Tensor:
        """The position on the ramp of noise level ``sigma`` (B,)."""
        return (sigma.double() ** (1 / self.rho) - self._low) / self._range

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.time_from_sigma(torch.exp(-log_snr.double() / 2))

    def timestep(self, t: Tensor) -> Tensor:
        return self.coefficients(t).sigma.log() / 4

    def time(self, timestep: Tensor) -> Tensor:
        return self.time_from_sigma(torch.exp(4 * timestep.double()))

    def input_scale(self, t: Tensor) -> Tensor:
        return (self.coefficients(t).sigma ** 2 + self.sigma_data**2) ** -0.5

    def initial_scale(self) -> float:
        # diffusers' EDM schedulers start from sqrt(sigma_max^2 + 1) * noise, so that is what the student learns.
        return math.sqrt(self.sigma_max**2 + 1)


class TrigFlowSchedule(NoiseSchedule):
    """TrigFlow (Lu & Song 2024, sCM, §3): alpha = cos, sigma = sin of the angle, t = angle / (pi / 2)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        angle = t.double() * (math.pi / 2)
        return Coefficients(angle.cos(), angle.sin())

    def derivatives(self, t: Tensor) -> Coefficients:
        alpha, sigma = self.coefficients(t)
        return Coefficients(-sigma * (math.pi / 2), alpha * (math.pi / 2))

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr.double() / 2)) / (math.pi / 2)

    def timestep(self, t: Tensor) -> Tensor:
        return t.double() * (math.pi / 2)

    def time(self, timestep: Tensor) -> Tensor:
        return timestep.double() / (math.pi / 2)


def from_scheduler(scheduler: Any) -> tuple[NoiseSchedule, str]:
    """The schedule a diffusers scheduler stands for, and its network's prediction type.

    Both are read from what the scheduler *has* (a table, flow sigmas, an EDM ramp), because several classes carry
    several families. The prediction type is one of :data:`fewstep.diffusion.prediction.KINDS`.

    Raises:
        ValueError: the scheduler is of no family that fewstep can train on.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    stated = config.get("prediction_type", "epsilon")
    flow_sigmas = config.get("use_flow_sigmas", False) or stated == "flow_prediction"
    if hasattr(scheduler, "precondition_outputs"):
        known = stated in ("epsilon", "v_prediction") and not name.startswith("Cosine")
        if not known or config.get("sigma_schedule", "karras") != "karras":
            raise ValueError(
                f"{name} with prediction_type={stated!r} is an EDM variant that fewstep does not train; "
                "use a teacher with an EDMEulerScheduler, which predicts epsilon or v, and the Karras ramp"
            )
        ramp = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "sigma_data": config.sigma_data}
        return EDMSchedule(**ramp, rho=config.get("rho", 7.0)), "edm" if stated == "epsilon" else "edm_v"
    if "SCM" in name:
        return TrigFlowSchedule(), "v_prediction"
    if flow_sigmas or (not hasattr(scheduler, "alphas_cumprod") and "shift" in config):
        return FlowSchedule(float(config.num_train_timesteps)), "flow"
    if stated == "v_prediction" and config.get("timestep_type") == "continuous":
        return _continuous_v(scheduler), "edm_v"
    if hasattr(scheduler, "alphas_cumprod"):
        if stated not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"{name} states prediction_type={stated!r}, which no table schedule of fewstep knows")
        return TableSchedule(scheduler.alphas_cumprod), stated
    raise ValueError(
        f"{name} has neither a table of alphas, nor flow sigmas, nor an EDM ramp, one of which fewstep needs to train; "
        "if the pipeline's network was trained with another scheduler, give it that one"
    )


def _continuous_v(scheduler: Any) -> EDMSchedule:
    """The schedule of an Euler scheduler that tells its network ln(sigma) / 4, as Stable Video Diffusion's does.

    Its v is that of x_t / sqrt(sigma^2 + 1), which is -F of an EDM network with sigma_data 1.
    """
    config = scheduler.config
    if not config.get("use_karras_sigmas") or config.get("sigma_min") is None or config.get("sigma_max") is None:
        raise ValueError(
            f"{type(scheduler).__name__} with continuous times walks another ramp than Karras' from sigma_max to "
            "sigma_min, and only that one is trained; give the pipeline a scheduler with use_karras_sigmas, sigma_min "
            "and sigma_max"
        )
    return EDMSchedule(config.sigma_min, config.sigma_max, sigma_data=1.0)
