"""Phased DMD's target: unbiased where only noisy samples exist, where the naive target is not."""

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.prediction import KINDS, add_noise, from_x0, transition
from fewstep.diffusion.schedule import Coefficients, EDMSchedule, FlowSchedule, NoiseSchedule, TableSchedule
from fewstep.losses.score import subinterval_target, subinterval_weight

MEANS, STD = torch.tensor([-2.0, 0.5, 1.5], dtype=torch.float64), 0.2
TABLE = TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0))
SCHEDULES: dict[str, tuple[NoiseSchedule, float, tuple[float, ...]]] = {
    "table": (
        TableSchedule(torch.linspace(1 - 1e-4, 1 - 0.02, 1000, dtype=torch.float64).cumprod(0)),
        0.3,
        (0.34, 0.45),
    ),
    "flow": (FlowSchedule(), 0.5, (0.55, 0.8)),
    "edm": (EDMSchedule(), 0.4, (0.45, 0.6)),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def at(schedule: NoiseSchedule, t: float, size: int = 1) -> Coefficients:
    return schedule.coefficients(torch.full((size,), t, dtype=torch.float64))


def exact_x0(x_t: Tensor, coefficients: Coefficients) -> Tensor:
    """E[x0 | x_t] of a mixture of three Gaussians, (N,)."""
    alpha, sigma = coefficients.alpha[0], coefficients.sigma[0]
    variance = alpha**2 * STD**2 + sigma**2
    offset = x_t[:, None] - alpha * MEANS
    share = torch.softmax(-(offset**2) / (2 * variance), 1)
    return (share * (MEANS + STD**2 * alpha / variance * offset)).sum(1)


def bias(target: Tensor, exact: Tensor, x_t: Tensor, bins: int = 12) -> float:
    """The largest mean error of a target among samples of like x_t; what a regression would learn is that mean."""
    edges = torch.quantile(x_t[:: len(x_t) // 10000], torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1])
    where = torch.bucketize(x_t, edges)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums.index_add_(1, where, torch.stack([target - exact, torch.ones_like(x_t)]))
    return float((sums[0] / sums[1]).abs().max())


@every_schedule
def test_the_target_is_unbiased_for_every_output_and_the_naive_one_is_not(name: str):
    """Monte Carlo, 200,000 samples: what a critic would learn from the target is what the exact score says."""
    schedule, s, times = SCHEDULES[name]
    size, generator = 200_000, torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x0 = MEANS[torch.randint(3, (size,), generator=generator)] + STD * draw()
    at_s, first_noise, noise = at(schedule, s), draw(), draw()
    x_s = add_noise(x0, first_noise, at_s)
    for time in times:
        t, at_t = torch.full((1,), time, dtype=torch.float64), at(schedule, time)
        step = transition(at_s, at_t)
        x_t = add_noise(x_s, noise, step)
        exact = exact_x0(x_t, at_t)
        target = subinterval_target(x_s, noise, at_s, at_t)
        for kind in KINDS:
            if kind.startswith("edm") and name != "edm":
                continue
            ours, truth, naive = (from_x0(x, kind, x_t, schedule, t) for x in (target.x0, exact, x_s))
            scale = float(truth.std())
            # The target's own noise, over the root of a bin's 17,000 samples, four times over.
            noise_floor = 4 * float((ours - truth).std()) / (size / 12) ** 0.5
            assert bias(ours, truth, x_t) < noise_floor
            assert bias(naive, truth, x_t) > max(3 * noise_floor, 0.05 * scale)
        # As noise, and put together, the target is the same combination.
        torch.testing.assert_close(target.noise, (x_t - at_t.alpha * target.x0) / at_t.sigma)


@every_schedule
def test_from_clean_samples_it_is_the_ordinary_target(name: str):
    schedule, _, (t, _) = SCHEDULES[name]
    x0, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    clean = Coefficients(torch.ones(3).double(), torch.zeros(3).double())
    target = subinterval_target(x0, noise, clean, at(schedule, t, 3))
    assert torch.equal(target.x0, x0)
    torch.testing.assert_close(target.noise, noise)
    torch.testing.assert_close(transition(clean, at(schedule, t, 3)), at(schedule, t, 3))


@every_schedule
def test_two_transitions_are_one(name: str):
    schedule, s, (t, u) = SCHEDULES[name]
    first, second = transition(at(schedule, s), at(schedule, t)), transition(at(schedule, t), at(schedule, u))
    whole = transition(at(schedule, s), at(schedule, u))
    torch.testing.assert_close(first.alpha * second.alpha, whole.alpha)
    torch.testing.assert_close((second.alpha * first.sigma) ** 2 + second.sigma**2, whole.sigma**2)


def test_the_flow_target_is_the_papers():
    """[(a_s^2 s_t + a_t s_s^2) / (a_s^2 s_ts)] noise - x_s / a_s."""
    x_s, noise = torch.randn(2, 2, 7, dtype=torch.float64)
    s, t = 0.5, 0.8
    at_s, at_t = at(FlowSchedule(), s), at(FlowSchedule(), t)
    sigma_ts = (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2) ** 0.5
    paper = ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * sigma_ts) * noise - x_s / (1 - s)
    target = subinterval_target(x_s, noise, at_s, at_t)
    torch.testing.assert_close(target.noise - target.x0, paper)


@every_schedule
def test_the_weight_is_small_where_the_target_is_noisy_and_the_same_for_one_snr(name: str):
    schedule, s, _ = SCHEDULES[name]
    flow = FlowSchedule()
    for t in (s + 0.02, s + 0.1, 0.9):
        alike = [flow.time_from_log_snr(schedule.log_snr(torch.tensor([x], dtype=torch.float64))) for x in (s, t)]
        ours = subinterval_weight(at(schedule, s), at(schedule, t), 10.0)
        torch.testing.assert_close(ours, subinterval_weight(*(flow.coefficients(x) for x in alike), 10.0))
        sigma_ts = transition(*(flow.coefficients(x) for x in alike)).sigma
        torch.testing.assert_close(ours, (sigma_ts**2 * (1 / sigma_ts**2).clamp(0, 10)))
