"""Which stock scheduler can carry a student: the candidates, in order of preference.

A student's grid travels in the config of a stock diffusers scheduler. Which class serves depends on what the pipeline
passes to it (sigmas, only a count, eta, a generator), and that is found by trying: see :mod:`fewstep.export.walk.plan`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.diffusion.strategic import Move
from fewstep.diffusion.timesteps import WalkTimes, even_grid, shift_time
from fewstep.export.errors import ExportError, NoRenoisingError


@dataclass(frozen=True)
class Wish:
    """What the student's scheduler has to do.

    Attributes:
        schedule: the teacher's, of the network's input.
        prediction_type: what the network says; the scheduler has to speak it.
        steps: length of the grid.
        renoise: ``"ode"``, ``"fresh"`` or ``"tcd"``.
        shift: of a flow grid.
        first_timestep: index of the table entry to start at; None: the top.
        first_sigma: noise level of an EDM student's first step; None: sigma_max.
        start: ``"noise"``: the first x_t is unit noise; ``"marginal"``: sigma times unit noise (SiD).
        last_sigma: the smallest of the sigmas that the pipeline itself passes for this count, None if it passes none.
        dynamic: config by which the pipeline shifts a flow grid by the size; None: the scheduler shifts, by ``shift``.
        gamma: of ``"tcd"``.
        times: of a flow's walk, where they are neither even nor shifted; no shift is taken then.
    """

    schedule: NoiseSchedule
    prediction_type: str
    steps: int
    renoise: str
    shift: float = 1.0
    first_timestep: int | None = None
    first_sigma: float | None = None
    start: str = "noise"
    last_sigma: float | None = None
    dynamic: dict[str, Any] | None = None
    gamma: float = 0.0
    times: WalkTimes | None = None

    @property
    def move(self) -> Move:
        """What a step does."""
        return Move(self.renoise, self.gamma)


def candidates(wish: Wish) -> Iterator[Any]:
    """Fresh scheduler instances that could carry the student, the preferred one first.

    Raises:
        ExportError: no stock scheduler does what is wished, whatever the pipeline.
    """
    schedule = wish.schedule
    if isinstance(schedule, FlowSchedule):
        yield from _flow(wish, schedule)
    elif isinstance(schedule, TableSchedule):
        yield from _table(wish, schedule)
    elif isinstance(schedule, EDMSchedule):
        yield _edm(wish, schedule)
    else:
        raise ExportError(f"no stock scheduler carries a student of a {type(schedule).__name__}")


def wanted_grid(wish: Wish) -> tuple[float, ...] | None:
    """The grid that the wish means, where it means a certain one; a table's grid is what its scheduler makes of it."""
    if isinstance(wish.schedule, TableSchedule):
        return None
    if wish.times is not None and isinstance(wish.schedule, FlowSchedule):
        return tuple(wish.times.grid(wish.steps).tolist())
    grid = even_grid(wish.steps, wish.shift)
    if isinstance(wish.schedule, EDMSchedule):
        grid *= _first_time(wish, wish.schedule)
    return tuple(grid.tolist())


def table_betas(schedule: TableSchedule, length: int) -> list[float]:
    """The first ``length`` betas of the teacher's table, computed back from its products of alphas.

    A scheduler's beta_start, beta_end and beta_schedule lose what its class does to the table afterwards (an SNR shift,
    a zero terminal SNR); the products are the truth.
    """
    products = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:length]])
    return (1 - products[1:] / products[:-1]).tolist()


def _flow(wish: Wish, schedule: FlowSchedule) -> Iterator[Any]:
    count = round(schedule.timestep_scale)
    if wish.renoise == "tcd":  # which no stock scheduler of a flow does
        file: Any = importlib.import_module("fewstep.pipelines.tcd_flow")
        yield file.FlowTCDScheduler(num_train_timesteps=count, shift=wish.shift, gamma=wish.gamma)
        return
    fresh = {"stochastic_sampling": True} if wish.renoise == "fresh" else {}
    if wish.times is not None:
        yield from _timed_flow(wish.times, wish.steps, count, fresh)
        return
    if wish.dynamic is not None:
        yield FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=count, use_dynamic_shifting=True, **wish.dynamic, **fresh
        )
        return
    # Right at every count under pipelines that pass their own sigmas.
    yield FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=wish.shift, **fresh)
    if wish.renoise == "ode":
        # Right at every count under pipelines that pass only a count; it does not take mu.
        yield FlowMapEulerDiscreteScheduler(num_train_timesteps=count, shift=wish.shift)
    if wish.steps > 1:
        # At one step its stretch divides by zero.
        yield _stretched_flow(wish, count, fresh)


def _timed_flow(times: WalkTimes, steps: int, count: int, fresh: dict[str, Any]) -> Iterator[Any]:
    if times.even and times.last > 0 and steps > 1:  # at one step its stretch divides by zero
        yield FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=1.0, shift_terminal=times.last, **fresh)
    file: Any = importlib.import_module("fewstep.pipelines.warped_flow")
    told = {"first": times.first, "last": times.last, "warp": list(times.warp)}
    yield file.WarpedFlowScheduler(num_train_timesteps=count, **told, **fresh)


def _stretched_flow(wish: Wish, count: int, fresh: dict[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """A FlowMatchEuler whose stretched grid is exactly the wished one, at ``wish.steps`` steps.

    It starts from N sigmas evenly spaced from 1 to b, shifts them by a and stretches them to end at ``shift_terminal``.
    With q = (N - 1) / (N (1 - b)) an evenly spaced u from 1 to 1/N is 1 - q (1 - v) with v from 1 to b; inserting this
    in the shift by k gives a shift by a = 1 + (k - 1) q / (1 + (k - 1)(1 - q)) and a stretch that ends at shift_k(1/N).
    """
    shift = wish.shift
    # Under a pipeline that passes only a count, b is the scheduler's own sigma_min, the shifted 1 / count.
    for _ in range(50):
        last = wish.last_sigma
        if last is None:
            last = float(shift_time(torch.tensor(1 / count), shift))
        q = (wish.steps - 1) / (wish.steps * (1 - last))
        shift = 1 + (wish.shift - 1) * q / (1 + (wish.shift - 1) * (1 - q))
    terminal = float(shift_time(torch.tensor(1 / wish.steps), wish.shift))
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=shift, shift_terminal=terminal, **fresh)


def _table(wish: Wish, schedule: TableSchedule) -> Iterator[Any]:
    if wish.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ExportError(f"no stock table scheduler speaks the prediction type {wish.prediction_type!r}")
    length = len(schedule.alphas_cumprod) if wish.first_timestep is None else wish.first_timestep + 1
    common = {
        "num_train_timesteps": length,
        "trained_betas": table_betas(schedule, length),
        "prediction_type": wish.prediction_type,
        # No effect on trailing grids; Stable Diffusion pipelines warn about any other value.
        "steps_offset": 1,
    }
    if wish.start == "marginal":
        # Its first sample is sigma_max * noise where its x is x_t / alpha: x_t = sigma * noise.
        yield EulerDiscreteScheduler(timestep_spacing="trailing", **common)
    elif wish.renoise == "tcd":
        # Of a grid of all entries any count takes those evenly spaced from the top, as DDIM's "trailing" does.
        swapped = {"timestep_spacing": "trailing", "clip_sample": False}
        yield TCDScheduler(original_inference_steps=length, **swapped, **common)
    elif wish.renoise == "fresh":
        # It reads neither in making its grid, but a scheduler that a user makes of its config does (``from_config``):
        # with them the usual ones land on this grid.
        swapped = {"timestep_spacing": "trailing", "clip_sample": False}
        yield LCMScheduler(original_inference_steps=wish.steps, **swapped, **common)
    else:
        yield DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **common)
        # DDIM computes the time it goes to from the step's length, which is off by one where the count does not divide
        # the table. Order 1 of this solver is the same step, and it looks the next time up.
        yield DPMSolverMultistepScheduler(
            timestep_spacing="trailing",
            solver_order=1,
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
            **common,
        )


def _edm(wish: Wish, schedule: EDMSchedule) -> EDMEulerScheduler:
    if wish.renoise != "ode":
        raise NoRenoisingError("no stock scheduler renoises an EDM student afresh")
    first = _first_time(wish, schedule)
    last = schedule.coefficients(torch.tensor([first / wish.steps], dtype=torch.float64)).sigma
    top = schedule.sigma_max if wish.first_sigma is None else wish.first_sigma
    return EDMEulerScheduler(
        sigma_min=float(last),
        sigma_max=top,
        sigma_data=schedule.sigma_data,
        rho=schedule.rho,
        prediction_type="v_prediction" if wish.prediction_type == "edm_v" else "epsilon",
    )


def _first_time(wish: Wish, schedule: EDMSchedule) -> float:
    """Where on its ramp an EDM student starts."""
    if wish.first_sigma is None:
        return 1.0
    return float(schedule.time_from_sigma(torch.tensor(wish.first_sigma)))
