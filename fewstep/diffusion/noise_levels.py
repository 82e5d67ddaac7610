"""Where between data and noise networks are compared: distributions of times, and the settings that choose one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.diffusion.timesteps import logit_normal_times, shift_time, uniform_times
from fewstep.sending import known_too

KINDS = ("uniform", "logit_normal", "log_normal")


@dataclass(frozen=True)
class NoiseLevels:
    """A distribution of times under a schedule.

    Attributes:
        kind: ``"uniform"`` in t; ``"logit_normal"``, t = sigmoid(mean + std n); ``"log_normal"``,
            sigma / alpha = exp(mean + std n) (Karras et al. 2022, Table 1).
        low: lowest time of a uniform.
        high: highest time of a uniform.
        shift: of a uniform on [0, 1], which is then clamped to [low, high]; None for a uniform on [low, high] itself.
        mean: of the normal.
        std: of the normal.
    """

    kind: str
    low: float = 0.0
    high: float = 1.0
    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"noise levels are {', '.join(KINDS)}, not {self.kind!r}")

    def draw(self, draws: Draws, name: str, schedule: NoiseSchedule) -> Tensor:
        """Times (B,), float64, from the draw ``name``."""
        draw = draws.uniform(name) if self.kind == "uniform" else draws.normal(name, ())
        return known_too(partial(self.times, schedule=schedule), draw)

    def times(self, draw: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Times (B,), float64, from uniform or standard normal draws (B,); of a table the nearest entries'."""
        if self.kind == "log_normal":
            t = schedule.time_from_log_snr(-2 * (self.mean + self.std * draw.double()))
        elif self.kind == "logit_normal":
            t = logit_normal_times(draw, self.mean, self.std)
        elif self.shift is None:
            t = uniform_times(draw, self.low, self.high)
        else:
            t = shift_time(draw, self.shift).clamp(self.low, self.high)
        return schedule.snap(t)
