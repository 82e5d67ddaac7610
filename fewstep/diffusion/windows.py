"""Windows of the time, in each of which a student walks one straight line (PeRFlow, Yan et al. 2024, arXiv 2405.07510).

The teacher's ODE leads x_s at a window's start to x_e at its end; the student learns the chord between the two. What it
says on the chord has one of three forms, with lam = alpha_e / alpha_s:

==========  ==============================  =======================================================================
form        the chord is straight in        what is said
==========  ==============================  =======================================================================
velocity    x_t / (alpha + sigma), over     its slope, noise - x0 in the schedule's own words: a chord of flow
            sigma / (alpha + sigma)         matching is that of x_t over t
ddim_eps    x_t, over t                     e in x_e = lam x_s + eta e with eta = sigma_e - lam sigma_s: a DDIM step
diff_eps    x_t, over t                     the same with eta = -sqrt(1 - gamma^2) / gamma, gamma = 1 / lam: the noise
                                            that takes x_e back to x_s
==========  ==============================  =======================================================================

Both noises differ by a number for each window. Times, positions and coefficients are float64 (B,).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.prediction import expand
from fewstep.diffusion.schedule import Coefficients, NoiseSchedule
from fewstep.diffusion.segments import Segments
from fewstep.diffusion.timesteps import shift_time, unshift_time

FORMS = ("velocity", "ddim_eps", "diff_eps")


@dataclass(frozen=True)
class Window:
    """For each of B samples the window that it is in.

    Attributes:
        start: the noisier end (B,), float64.
        end: the cleaner one (B,), 0 for the clean sample.
    """

    start: Tensor
    end: Tensor


def windows_of(grid: Sequence[float], count: int) -> Segments:
    """The ``count`` windows of a student that makes equally many steps in each.

    Args:
        grid: the student's times, descending, without the final 0.
        count: divides their number.
    """
    return Segments((0.0, *reversed(grid[:: len(grid) // count])))


def window_at(windows: Segments, t: Tensor) -> Window:
    """The windows start >= t > end of times (B,) that lie above 0 and not above the first window's start."""
    return Window(windows.upper(t), windows.lower(t))


def times_up_to(top: float, uniform: Tensor, schedule: NoiseSchedule, shift: float = 1.0) -> Tensor:
    """Times (B,) from ``uniform`` draws (B,) on [0, 1): even on (0, ``top``], where 0 draws the top.

    At the entries of a table, and under flow matching even before the ``shift``.
    """
    uniform = uniform.double()
    if schedule.num_train_timesteps is not None:
        entries = round(top * schedule.num_train_timesteps)
        return (entries - (uniform * entries).floor()) / schedule.num_train_timesteps
    unshifted = top / (shift + (1 - shift) * top)
    return shift_time((1 - uniform) * unshifted, shift)


def solver_times(window: Window, steps: int, schedule: NoiseSchedule, shift: float = 1.0) -> list[Tensor]:
    """The ``steps`` + 1 times (B,) of a solver from each window's start to its end, even, at entries of a table.

    Under flow matching they are even before the ``shift``, as the teacher's own times are.
    """
    start, end = unshift_time(window.start, shift), unshift_time(window.end, shift)
    between = [schedule.snap(shift_time(torch.lerp(start, end, i / steps), shift)) for i in range(1, steps)]
    return [window.start, *between, window.end]


def line(form: str, schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, position), each (B,): x_t / scale is what lies on the chord, at this position."""
    if form == "velocity":
        alpha, sigma = schedule.coefficients(t)
        return alpha + sigma, sigma / (alpha + sigma)
    return torch.ones_like(t, dtype=torch.float64), t.double()


def on_chord(y_s: Tensor, y_e: Tensor, start: Tensor, end: Tensor, at: Tensor) -> Tensor:
    """The point (B, ...) at the position ``at`` (B,) of the chord from ``y_s`` at ``start`` to ``y_e`` at ``end``."""
    return torch.lerp(y_s, y_e, expand((start - at) / (start - end), y_s))


def slope(y_s: Tensor, y_e: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The slope (y_e - y_s) / (end - start) of a chord (B, ...) over its positions (B,)."""
    return (y_e - y_s) * expand(1 / (end - start), y_s)


def noise_map(form: str, start: Coefficients, end: Coefficients) -> tuple[Tensor, Tensor]:
    """(lam, eta), each (B,), of x_e = lam x_s + eta e; ``form`` is ``ddim_eps`` or ``diff_eps``."""
    lam = end.alpha / start.alpha
    if form == "ddim_eps":
        return lam, end.sigma - lam * start.sigma
    return lam, -(lam**2 - 1).sqrt()


def noise_of_chord(x_s: Tensor, x_e: Tensor, lam: Tensor, eta: Tensor) -> Tensor:
    """The e (B, ...) of a chord: (x_e - lam x_s) / eta."""
    return (x_e - expand(lam, x_s) * x_s) * expand(1 / eta, x_s)


def chord_end(x_t: Tensor, said: Tensor, share: Tensor, lam: Tensor, eta: Tensor) -> Tensor:
    """Where the chord ends, (B, ...), on which ``said`` (B, ...) is e at the point ``x_t``.

    x_e = (lam x_t + (1 - share) eta e) / (1 - share + share lam), with ``share`` (B,) of the chord behind x_t.
    """
    left = 1 - share
    whole = left + share * lam
    return expand(lam / whole, x_t) * x_t + expand(left * eta / whole, x_t) * said


def noisy_weight(t: Tensor) -> Tensor:
    """PeRFlow's weight 1 / (2.3 max(1 - t, 0.1)) of a squared error at times ``t`` (B,): more of it at the noise."""
    return 1 / (2.3 * (1 - t.double()).clamp(min=0.1))
