"""TCD's walk: its ends are the ODE and fresh noise, its variance is right, and a table's is the stock scheduler's."""

import pytest
import torch
from diffusers import TCDScheduler
from toys import TABLE, unconditional

from fewstep.diffusion.prediction import add_noise, ode_step
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import FlowSchedule, from_scheduler
from fewstep.diffusion.strategic import strategic_step, strategic_time, walk_end

every_schedule = pytest.mark.parametrize("schedule", [TABLE, FlowSchedule()], ids=["table", "flow"])


def numbers(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]


def full(t: float) -> torch.Tensor:
    return torch.full((3,), t, dtype=torch.float64)


@every_schedule
def test_without_new_noise_it_is_the_ode_and_with_nothing_but_noise_the_end_noised_anew(schedule):
    x_t, x0, noise = numbers(0, 1, 2)
    t, then = full(0.75), full(0.5)
    now, there = schedule.coefficients(t), schedule.coefficients(then)
    ode = strategic_step(schedule, x_t, x0, t, then, 0.0, noise)
    torch.testing.assert_close(ode, ode_step(x_t, x0, now, there), rtol=0, atol=1e-12)
    end = full(walk_end(schedule, "tcd"))
    at_end = ode_step(x_t, x0, now, schedule.coefficients(end))
    fresh = strategic_step(schedule, x_t, x0, t, then, 1.0, noise)
    if isinstance(schedule, FlowSchedule):
        torch.testing.assert_close(fresh, add_noise(x0, noise, there), rtol=0, atol=1e-12)
    ratio = there.alpha / schedule.coefficients(end).alpha
    variance = there.sigma**2 - (ratio * schedule.coefficients(end).sigma) ** 2
    torch.testing.assert_close(fresh, ratio[:, None] * at_end + variance.sqrt()[:, None] * noise, rtol=0, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("gamma", [0.2, 0.3, 0.8])
def test_the_samples_of_a_point_keep_the_schedules_variance(schedule, gamma: float):
    # All data is one point, so the true x0 is known and x' has to be alpha' x0 + sigma' times unit noise.
    first, second = numbers(1, 2)
    x0 = torch.full_like(first, 0.7)
    t, then = full(0.75), full(0.5)
    x_t = add_noise(x0, first, schedule.coefficients(t))
    moved = strategic_step(schedule, x_t, x0, t, then, gamma, second)
    (alpha, sigma), back = schedule.coefficients(then), schedule.coefficients(strategic_time(schedule, then, gamma))
    kept = (alpha * back.sigma / (back.alpha * sigma))[:, None]
    assert 0 < float(kept.min()) < 1
    unit = kept * first + (1 - kept**2).sqrt() * second
    torch.testing.assert_close(moved, alpha[:, None] * x0 + sigma[:, None] * unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.3), (4, 0.3), (4, 1.0), (7, 0.55), (8, 0.2)])
def test_a_walk_is_that_of_the_stock_scheduler(kind: str, steps: int, eta: float):
    stock = TCDScheduler(prediction_type=kind)
    schedule, _ = from_scheduler(stock)
    stock.alphas_cumprod = schedule.alphas_cumprod
    stock.set_timesteps(steps)
    (x,) = numbers(3)

    def say(x_t, t, _conditioning, end=None):
        return x_t.tanh() * (1 - t[:, None])

    theirs = x
    generator = torch.Generator().manual_seed(5)
    for timestep in stock.timesteps:
        t = schedule.time(torch.full((3,), float(timestep), dtype=torch.float64))
        x0, (alpha, sigma) = say(theirs, t, None), schedule.coefficients(t)
        eps = (theirs - alpha[:, None] * x0) / sigma[:, None]
        raw = {"epsilon": eps, "sample": x0, "v_prediction": alpha[:, None] * eps - sigma[:, None] * x0}[kind]
        theirs = stock.step(raw, timestep, theirs, eta=eta, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(steps)]
    grid = tuple(schedule.time(stock.timesteps).tolist())
    ours = rollout(say, Sampler(schedule, grid, "tcd", 1.0, eta), x, unconditional(3), lambda k: noises[k - 1])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
