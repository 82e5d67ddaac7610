"""The consistency family's golden files, compared with the functions that the trainer is made of."""

import json
import math
from functools import partial

import torch
from diffusers import LCMScheduler
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning, toy_denoiser

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.discretization import (
    EasyTimes,
    EvenTimes,
    SigmaRange,
    TimePair,
    adaptive_decay,
    ect_gap,
    ect_mapping,
    karras_levels,
    progressive_levels,
)
from fewstep.diffusion.ode import solver_step
from fewstep.diffusion.prediction import ode_step, x0_map
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.diffusion.schedule import Coefficients, EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.losses.consistency import DISTANCES, WEIGHTINGS, hard_boundary, lcm_scalings, shifted_edm_scalings, weight
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import guidance_embedding
from fewstep.trainers.consistency import Boundary, Comparison, Consistency, ConsistencyConfig

SOLVERS = {"none": "none", "euler": "euler", "ddim": "euler", "heun": "heun"}


# --- what the cases share ---------------------------------------------------------------------------------------------


def given(golden: GoldenFile, name: str) -> bool:
    """Whether the file states an option; what does not apply to a file is absent."""
    return name in json.loads(golden.metadata["options"])


def schedule_of(golden: GoldenFile) -> NoiseSchedule:
    """EDM, its ramp where the file states one, or flow matching."""
    if golden.choice("schedule", "edm", "rf") == "rf":
        return FlowSchedule()
    ramp = ("sigma_min", "sigma_max", "rho", "sigma_data")
    return EDMSchedule(**{name: golden.number(name) for name in ramp if given(golden, name)})


def network(golden: GoldenFile, coefficients: str, schedule: NoiseSchedule) -> NetworkDenoiser:
    """A toy network under any of the family's schedules."""
    if not isinstance(schedule, FlowSchedule):
        return golden.denoiser(coefficients, schedule)
    golden.choice("prediction_type", "velocity")
    golden.choice("toy_time", "t")
    return toy_denoiser(golden[coefficients], schedule, "flow", 1000.0)


def guided(golden: GoldenFile, schedule: NoiseSchedule, on: bool) -> GuidedDenoiser:
    """The teacher; guided by ``in.guidance_scale`` where there is one, else by the scale of each sample."""
    null = toy_conditioning(torch.zeros(1, dtype=torch.float64))
    scale = golden["guidance_scale"].item() if on and "in.guidance_scale" in golden.tensors else 1.0
    return GuidedDenoiser(network(golden, "k_teacher", schedule), null if on else None, scale)


def trainer(golden: GoldenFile, schedule: NoiseSchedule, boundary: Boundary, **settings) -> Consistency:
    """The trainer's own class on toy networks, told the file's choices."""
    golden.choice("target_detached", True)
    distance = golden.choice("distance", *DISTANCES)
    weighting = golden.choice("weighting", *WEIGHTINGS) if given(golden, "weighting") else "uniform"
    solver = SOLVERS[golden.choice("solver", *SOLVERS)] if given(golden, "solver") else "none"
    form = golden.choice("guidance_form", "none", "u+w*(c-u)", "c+w*(c-u)")
    config = ConsistencyConfig(
        teacher="toy", out="out", data="toy", solver=solver, distance=distance, weighting=weighting, **settings
    )
    roles = {"student": network(golden, "k_student", schedule)}
    if golden.choice("target_network", "student", "separate") == "separate":
        roles["target"] = network(golden, "k_target", schedule)
    teacher = guided(golden, schedule, form != "none") if solver != "none" else None
    return Consistency(config, roles, teacher, Sampler(schedule, (1.0,), "fresh"), None, boundary)


def mapping_k(golden: GoldenFile) -> float:
    """k of ECT's mapping; a constant one is that of k = 0."""
    k = golden.number("mapping_k") if given(golden, "mapping_k") else 0.0
    return k if golden.choice("mapping", "sigmoid", "const") == "sigmoid" else 0.0


def check_gradient(golden: GoldenFile, method: Consistency, loss: Tensor) -> None:
    """Of the student's coefficients; teacher and target get none."""
    loss.backward()
    golden.check("grad_k_student", method.student.network.k.grad)
    outside = [method.teacher.denoiser] if method.teacher is not None else []
    outside += [method.target] if method.target is not method.student else []
    assert all(other.network.k.grad is None for other in outside)


def weighted(golden: GoldenFile, method: Consistency, seen: Comparison, pair: TimePair) -> tuple[Tensor, Tensor]:
    """The distance and the weighted loss of each sample."""
    apart = method.distance(seen)
    return apart, weight(method.weighting, pair.sigma_t, pair.sigma_r, method.sigma_data) * apart


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


NATURAL = partial(hard_boundary, lowest=-math.inf)  # f is x0 itself


def cm_loss(golden: GoldenFile) -> None:
    golden.choice("objective", "distillation", "training")
    golden.choice("reduction", "mean")
    golden.choice("teacher_scalings", "edm")
    schedule = schedule_of(golden)
    own = golden.choice("student_scalings", "boundary", "edm") == "boundary"
    method = trainer(golden, schedule, edm_boundary(golden, schedule) if own else NATURAL, variant="cd")
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
    check_gradient(golden, method, loss.mean())


def fastgen_loss(golden: GoldenFile) -> None:
    golden.choice("objective", "distillation", "training")
    golden.choice("reduction", "mean")
    schedule = schedule_of(golden)
    method = trainer(golden, schedule, NATURAL, variant="ect", huber_c=golden["huber_c"].item())
    # The source maps the schedule's own time, which for flow matching is not the noise level.
    k, t = mapping_k(golden), golden["t"]
    r = ect_mapping(t, 1 - golden["ratio"].item(), k, golden.number("mapping_b")).clamp(min=golden["min_r"].item())
    golden.check("r", r)
    if isinstance(schedule, EDMSchedule):
        pair = TimePair(schedule.time_from_sigma(t), schedule.time_from_sigma(r), t, r)
    else:
        pair = TimePair(t, r, t, r)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning())
    golden.check("f_t", seen.f)
    golden.check("f_r", seen.target)
    if method.weighting in ("1/c_out", "1/c_out^2"):  # of the noise level
        (alpha_t, sigma_t), (alpha_r, sigma_r) = (schedule.coefficients(time) for time in (pair.t, pair.r))
        pair = TimePair(pair.t, pair.r, sigma_t / alpha_t, sigma_r / alpha_r)
    apart, loss = weighted(golden, method, seen, pair)
    golden.check("loss_unweighted", apart)
    golden.check("loss_per_sample", loss)
    golden.check("loss_mean", loss.mean())
    check_gradient(golden, method, loss.mean())


# --- ECT --------------------------------------------------------------------------------------------------------------


def ect_loss(golden: GoldenFile) -> None:
    golden.choice("reduction", "mean")
    golden.choice("target_at_r_zero", "clean_data")
    golden.choice("time_sampler", "log_normal")
    schedule = schedule_of(golden)
    method = trainer(golden, schedule, NATURAL, variant="ect", huber_c=golden["c"].item())
    times = EasyTimes(
        SigmaRange(schedule),
        stage_steps=1,
        q=golden["q"].item(),
        k=mapping_k(golden),
        b=golden.number("mapping_b"),
        mean=golden.number("p_mean"),
        std=golden.number("p_std"),
    )
    pair = times.neighbours(golden["normal"], int(golden["stage"]))
    golden.check("t", pair.sigma_t)
    golden.check("r", pair.sigma_r)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning())
    _, loss = weighted(golden, method, seen, pair)
    golden.check("loss_per_sample", loss)
    golden.check("loss_mean", loss.mean())
    check_gradient(golden, method, loss.mean())


def ect_time_mapping(golden: GoldenFile) -> None:
    golden.choice("schedule", "edm")
    k = mapping_k(golden)
    for name in golden.expected(r"r\.q.+\.stage\d+"):
        q, stage = name.removeprefix("r.q").split(".stage")
        golden.check(name, ect_mapping(golden["t"], ect_gap(int(stage), float(q)), k, golden.number("mapping_b")))


# --- LCM --------------------------------------------------------------------------------------------------------------


def lcm_boundary(golden: GoldenFile, schedule: NoiseSchedule) -> Boundary:
    scaling, sigma_data = golden.number("timestep_scaling"), golden.number("sigma_data")
    return lambda t: lcm_scalings(schedule.timestep(t), scaling, sigma_data)


def lcm_loss(golden: GoldenFile) -> None:
    golden.choice("reduction", "mean")
    golden.choice("guidance_space", "x0_and_epsilon")  # which for a linear conversion at one x_t is guided x0
    grid_size, count = golden.number("num_grid"), golden.number("num_train_timesteps")
    upper = (count // grid_size) * (golden["index"] + 1) - 1
    lower = (upper - count // grid_size).clamp(min=0)
    entries, products = torch.cat([upper, lower]), torch.cat([golden["abar_start"], golden["abar_prev"]])
    torch.testing.assert_close(golden["abar_prev"], golden["abar_target"], rtol=0, atol=0)
    schedule = golden.table_schedule(entries, products)
    boundary = lcm_boundary(golden, schedule)
    method = trainer(golden, schedule, boundary, variant="lcm", huber_c=golden.number("huber_c"))

    grid = EvenTimes(SigmaRange(schedule), [grid_size + 1])
    pair = grid.neighbours(grid.times(0), golden["index"])
    golden.check("timestep", schedule.timestep(pair.t).round())
    golden.check("timestep_prev", schedule.timestep(pair.r).round())
    for name, t in (("start", pair.t), ("target", pair.r)):
        skip, out = boundary(t)
        golden.check(f"c_skip_{name}", skip)
        golden.check(f"c_out_{name}", out)

    # The source's w is that of c + w (c - u): ours is one more.
    low, high = golden["w_range"]
    scale = 1 + low + golden["uniform_w"] * (high - low)
    golden.check("w", scale - 1)
    student_cond = golden["cond"]
    if golden.choice("w_embedding", "sinusoidal_sin_cos", "none") != "none":
        size, period = golden.number("w_embedding_dim"), golden.number("w_embedding_max_period")
        embedding = guidance_embedding(scale, size, period, golden.number("w_embedding_scale"))
        golden.check("w_embedding", embedding)
        golden.choice("toy_condition", "cond+factor*w_embedding[:,column]")
        column = embedding[:, golden.number("toy_condition_column")]
        student_cond = student_cond + golden.number("toy_condition_factor") * column

    # The teacher of these files is not told the guidance: what student and target are given is put in behind it.
    for role in {id(role): role for role in (method.student, method.target)}.values():
        answer = role.raw
        role.raw = lambda x, t, _conditioning, answer=answer: answer(x, t, toy_conditioning(student_cond))
    on = golden.choice("guide_teacher", True, False)
    seen = method.compare(golden["x"], golden["noise"], pair, golden.conditioning(), scale if on else None)
    golden.check("x_prev", seen.x_r)
    golden.check("model_pred", seen.f)
    golden.check("target", seen.target)
    loss = weighted(golden, method, seen, pair)[1].mean()
    golden.check("loss", loss)
    check_gradient(golden, method, loss)


def lcm_sampler(golden: GoldenFile) -> None:
    golden.choice("guidance_form", "none")
    golden.choice("final_step", "denoised")
    stock = LCMScheduler(original_inference_steps=golden.number("num_grid"))
    stock.set_timesteps(int(golden["num_steps"]))
    timesteps = stock.timesteps
    schedule = golden.table_schedule(timesteps, golden["abar_timesteps"])
    golden.check("timesteps", timesteps)
    method = Consistency(
        ConsistencyConfig(teacher="toy", out="out"),
        {"student": golden.denoiser("k", schedule)},
        None,
        Sampler(schedule, tuple(schedule.time(timesteps).tolist()), "fresh"),
        None,
        lcm_boundary(golden, schedule),
    )
    f, inputs, outputs = method.function(method.student), [], []

    def watched(x_t: Tensor, t: Tensor, conditioning: Conditioning, end: Tensor | None = None) -> Tensor:
        inputs.append(x_t)
        outputs.append(f(x_t, t, conditioning))
        return outputs[-1]

    x0 = rollout(watched, method.sampler, golden["x_init"], golden.conditioning(), lambda k: golden["noises"][k - 1])
    golden.check("trajectory", torch.stack([*inputs, x0]))
    golden.check("denoised", torch.stack(outputs))


# --- the teacher's solver ---------------------------------------------------------------------------------------------


def edm_heun_sampler(golden: GoldenFile) -> None:
    golden.choice("guidance_form", "none")
    golden.choice("last_step", "euler")
    schedule = schedule_of(golden)
    teacher, conditioning = golden.denoiser("k_teacher", schedule), golden.conditioning()
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
    "ect_loss": ect_loss,
    "ect_time_mapping": ect_time_mapping,
    "lcm_distillation_loss": lcm_loss,
    "lcm_sampler": lcm_sampler,
    "edm_heun_sampler": edm_heun_sampler,
}
