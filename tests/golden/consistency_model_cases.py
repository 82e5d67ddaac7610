"""Golden files of Consistency Models and of their teacher's solver, compared with what the trainer is made of."""

import math

import torch
from consistency_trainer import NATURAL, check_gradient, huber_c, mapping_k, schedule_of, trainer, weighted
from golden_file import GoldenFile
from torch import Tensor
from vocabulary import guided

from fewstep.diffusion.discretization import (
    EvenTimes,
    SigmaRange,
    TimePair,
    adaptive_decay,
    ect_mapping,
    karras_levels,
    progressive_levels,
)
from fewstep.diffusion.ode import solver_step
from fewstep.diffusion.prediction import ode_step, x0_map
from fewstep.diffusion.schedule import Coefficients, EDMSchedule, FlowSchedule
from fewstep.losses.consistency import shifted_edm_scalings
from fewstep.trainers.consistency import Boundary

# --- CM ---------------------------------------------------------------------------------------------------------------


def scalings(golden: GoldenFile) -> None:
    schedule = schedule_of(golden)
    skip, out = shifted_edm_scalings(golden["sigma"], golden.number("sigma_min"), golden.number("sigma_data"))
    golden.check("boundary_c_skip", skip)
    golden.check("boundary_c_out", out)
    t = schedule.time_from_sigma(golden["sigma"])
    skip, out = x0_map("edm", schedule, t)
    golden.check("edm_c_skip", skip)
    golden.check("edm_c_out", out)
    for name in golden.expected(".*c_in"):  # the network's input is the same for both
        golden.check(name, schedule.input_scale(t))


def scale_schedule(golden: GoldenFile) -> None:
    steps, first, last = (int(golden[name]) for name in ("total_steps", "s0", "s1"))
    decay = golden["mu0"].item()
    progressive = golden.choice("scale_mode", "progressive", "fixed") == "progressive"
    adaptive = golden.choice("target_ema_mode", "adaptive", "fixed") == "adaptive"
    at = golden["step"].tolist()
    counts = [progressive_levels(step, steps, first, last) if progressive else first for step in at]
    decays = [adaptive_decay(step, steps, first, last, decay) if adaptive else decay for step in at]
    golden.check("num_scales", torch.tensor(counts))
    golden.check("ema", torch.tensor(decays, dtype=torch.float64))


def edm_boundary(golden: GoldenFile, schedule: EDMSchedule) -> Boundary:
    """CM's shifted scalings as (skip, out) of f = skip x_t + out x0."""
    sigma_min, sigma_data = golden.number("sigma_min"), golden.number("sigma_data")

    def boundary(t: Tensor) -> tuple[Tensor, Tensor]:
        skip, out = shifted_edm_scalings(schedule.coefficients(t).sigma, sigma_min, sigma_data)
        edm_skip, edm_out = x0_map("edm", schedule, t)
        return skip - out / edm_out * edm_skip, out / edm_out

    return boundary


def cm_loss(golden: GoldenFile) -> None:
    golden.choice("teacher_scalings", "edm")
    schedule = schedule_of(golden)
    own = golden.choice("student_scalings", "boundary", "edm") == "boundary"
    method = trainer(
        golden, schedule, edm_boundary(golden, schedule) if own else NATURAL, variant="cd", huber_c=huber_c(golden)
    )
    grid = EvenTimes(SigmaRange(schedule), [int(golden["num_scales"])])
    times = grid.times(0)
    # The source counts from the noisy end.
    pair = grid.neighbours(times, len(times) - 2 - golden["index"])
    golden.check("t", pair.sigma_t)
    golden.check("t_next", pair.sigma_r)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning())
    golden.check("x_next", seen.x_r)
    golden.check("f_student", seen.f)
    golden.check("f_target", seen.target)
    _, loss = weighted(golden, method, seen, pair)
    golden.check("loss_per_sample", loss)
    check_gradient(golden, method, golden.over_mean(golden["x"]) * loss.mean())


def fastgen_loss(golden: GoldenFile) -> None:
    schedule = schedule_of(golden)
    method = trainer(golden, schedule, NATURAL, variant="ect", huber_c=huber_c(golden))
    # The source maps the schedule's own time, which for flow matching is not the noise level.
    k, t = mapping_k(golden), golden["t"]
    r = ect_mapping(t, 1 - golden["ratio"].item(), k, golden.number("mapping_b")).clamp(min=golden["min_r"].item())
    golden.check("r", r)
    scale = schedule.timestep_scale if isinstance(schedule, FlowSchedule) else 1.0
    if isinstance(schedule, EDMSchedule):
        pair = TimePair(schedule.time_from_sigma(t), schedule.time_from_sigma(r), t, r)
    else:
        pair = TimePair(schedule.time(scale * t), schedule.time(scale * r), t, r)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning())
    golden.check("f_t", seen.f)
    golden.check("f_r", seen.target)
    if method.weighting in ("1/c_out", "1/c_out^2"):  # of the noise level
        (alpha_t, sigma_t), (alpha_r, sigma_r) = (schedule.coefficients(time) for time in (pair.t, pair.r))
        pair = TimePair(pair.t, pair.r, sigma_t / alpha_t, sigma_r / alpha_r)
    apart, loss = weighted(golden, method, seen, pair)
    golden.check("loss_unweighted", apart)
    golden.check("loss_per_sample", loss)
    total = golden.over_mean(golden["x"]) * loss.mean()
    golden.check("loss_mean", total)
    check_gradient(golden, method, total)


# --- the teacher's solver ---------------------------------------------------------------------------------------------


def edm_heun_sampler(golden: GoldenFile) -> None:
    golden.choice("last_step", "euler")
    schedule = schedule_of(golden)
    teacher, conditioning = guided(golden, golden.denoiser("k_teacher", schedule)), golden.conditioning()
    count, churn = int(golden["num_steps"]), golden["S_churn"].item()
    limits = golden.number("s_min"), golden.number("s_max"), golden.number("s_noise")
    levels = karras_levels(count, schedule.sigma_min, schedule.sigma_max, schedule.rho).flip(0)
    golden.check("sigma_steps", torch.cat([levels, torch.zeros(1, dtype=torch.float64)]))
    x, calls = levels[0] * golden["latents"], []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append(schedule.coefficients(t).sigma[0])
        return teacher(x_t, t, conditioning)

    for i, sigma in enumerate(levels.tolist()):
        gamma = min(churn / count, math.sqrt(2) - 1) if limits[0] <= sigma <= limits[1] else 0.0
        if gamma > 0:
            x = x + math.sqrt((sigma + gamma * sigma) ** 2 - sigma**2) * limits[2] * golden["noises"][i]
        t = schedule.time_from_sigma(torch.full((len(x),), sigma + gamma * sigma, dtype=torch.float64))
        if i + 1 < count:
            x = solver_step(denoise, schedule, x, t, schedule.time_from_sigma(levels[i + 1].expand(len(x))), "heun")
        else:
            one = torch.ones_like(t)
            x = ode_step(x, denoise(x, t), schedule.coefficients(t), Coefficients(one, 0 * one))
    golden.check("samples", x)
    golden.check("sigma_calls", torch.stack(calls))


CASES = {
    "cm_scalings": scalings,
    "cm_scale_schedule": scale_schedule,
    "cm_loss": cm_loss,
    "cm_fastgen_loss": fastgen_loss,
    "edm_heun_sampler": edm_heun_sampler,
}
