"""Golden files of rectified flow and 2-rectified flow++, compared with the functions that the trainer is made of."""

from pathlib import Path

import torch
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning

from fewstep.conditioning.conditioning import Conditioning
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import EDMSchedule, FlowSchedule, NoiseSchedule
from fewstep.diffusion.timesteps import even_grid, exponential_times, u_shaped_times, uniform_times
from fewstep.losses.flow import velocity_error
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.perceptual import PerceptualDistance
from fewstep.networks.roles import NetworkRole
from fewstep.trainers.rectified_flow import RectifiedFlow, RectifiedFlowConfig


def student(golden: GoldenFile) -> NetworkDenoiser:
    """The toy student in the schedule of its own; a ``wrapper`` only names the time that a file states its times in."""
    return golden.denoiser("k_student", schedule(golden))


def schedule(golden: GoldenFile) -> NoiseSchedule:
    if golden.choice("schedule", "edm", "rf") == "edm":
        # The ramp only says which t a sigma has, and this one spans every sigma of these files.
        return EDMSchedule(sigma_min=1e-6, sigma_max=1e6, sigma_data=number(golden, "sigma_data"))
    return FlowSchedule(timestep_scale=1.0)


def number(golden: GoldenFile, name: str) -> float:
    """A number that is an option, or a tensor where it differs from draw to draw."""
    return golden.number(name) if golden.states(name) else golden[name].item()


def times(golden: GoldenFile, schedule: NoiseSchedule, flow_time: Tensor) -> Tensor:
    """The schedule's t at which the network has the signal-to-noise ratio of a rectified-flow time."""
    if golden.states("wrapper"):
        golden.choice("wrapper", "rf")
    return schedule.time_from_flow_time(flow_time)


def no_condition(x: Tensor) -> Conditioning:
    """The null condition: none of these files has another one."""
    return toy_conditioning(torch.zeros(len(x), dtype=x.dtype))


def trainer(denoiser: NetworkDenoiser, distance: PerceptualDistance | None = None, **settings) -> RectifiedFlow:
    """The trainer's own class around a toy student."""
    config = RectifiedFlowConfig(teacher="toy", out=str(Path("unused")), **settings)
    roles = {"student": NetworkRole("student", denoiser)}
    return RectifiedFlow(config, roles, Sampler(denoiser.schedule, (1.0,), "ode"), distance)


def rectified_flow_loss(golden: GoldenFile) -> None:
    denoiser = student(golden)
    # The source's time runs from eps at the noise to 1 at the data.
    highest = 1 - number(golden, "eps")
    sampler = golden.choice("time_sampler", "uniform", "t0", "k_step")
    if sampler == "uniform":
        t = uniform_times(1 - golden["draw"], 0.0, highest)
    elif sampler == "t0":
        t = torch.full((len(golden["x"]),), highest, dtype=torch.float64)
    else:
        t = highest * even_grid(round(number(golden, "num_steps")))[golden["draw"]]
    golden.check("t", t)
    x, schedule = golden["x"], denoiser.schedule
    x_t = add_noise(x, golden["z"], schedule.coefficients(t))
    x0_student = denoiser(x_t, t, no_condition(x))
    method, flow_time = trainer(denoiser, loss="l2"), schedule.flow_time(t)
    rows = [slice(i, i + 1) for i in range(len(x))]
    each = torch.stack([method.distance(x[row], x0_student[row], flow_time[row])[0] for row in rows])
    torch.testing.assert_close(method.distance(x, x0_student, flow_time)[0], each.mean())
    each = golden.over_mean(x) * each
    each.mean().backward()
    golden.check_loss("loss", each)
    golden.check("grad_k_student", denoiser.network.k.grad)


def rfpp_loss(golden: GoldenFile) -> None:
    denoiser = student(golden)
    scalings = {"dim": "released", "sqrt_dim": "sqrt", "sqrt(dim)": "sqrt", "sqrt": "sqrt"}
    scaling = scalings[golden.choice("huber_c_scaling", *scalings)]
    settings = {"huber_factor": number(golden, "huber_c_factor"), "huber_scaling": scaling}
    kind = golden.choice("loss_type", "huber", "lpips_huber", "lpips_huber_over_t")
    distance = None
    if kind != "huber":
        golden.choice("perceptual", "mse_of_unit_range_bilinear_224")
        distance = PerceptualDistance(lambda a, b: (a - b).square().flatten(1).mean(1), lambda x0: x0 / 2 + 0.5)
        settings |= {"time_weight": "1-t", "perceptual_weight": 1.0, "perceptual_over_t": kind == "lpips_huber_over_t"}
    flow_time, x, z = golden["t"], golden["x"], golden["z"]
    t = times(golden, denoiser.schedule, flow_time)
    x0_student = denoiser(add_noise(x, z, denoiser.schedule.coefficients(t)), t, no_condition(x))
    golden.check("pred_velocity", z - x + velocity_error(x, x0_student, flow_time))
    method = trainer(denoiser, distance, **settings)
    loss = golden.over_mean(x) * method.distance(x, x0_student, denoiser.schedule.flow_time(t))[0]
    loss.backward()
    golden.check("loss", loss)
    golden.check("grad_k_student", denoiser.network.k.grad)
    if kind != "huber":
        plain, _ = trainer(denoiser, **{**settings, "time_weight": "uniform", **_NO_LPIPS}).distance(
            x, x0_student.detach(), denoiser.schedule.flow_time(t)
        )
        golden.check("huber_mean", plain)
        golden.check("perceptual_mean", distance(x0_student, x).mean())


_NO_LPIPS = {"perceptual_weight": 0.0, "perceptual_over_t": False}


def rfpp_sampler(golden: GoldenFile) -> None:
    denoiser = student(golden)
    solver = golden.choice("solver", "euler", "heun")
    calls = round(number(golden, "nfe"))
    steps = calls if solver == "euler" else (calls + 1) // 2
    flow_times = even_grid(steps)
    flow_times[0] = number(golden, "t_start")
    t = times(golden, denoiser.schedule, flow_times).tolist()
    z = golden["z1"]
    anchor = {"new": z, "default": None}[golden.choice("update_rule", "new", "default")]
    ode_solver = OdeSolver(denoiser, denoiser.schedule, solver, line="flow", anchor=anchor)
    scales = [float(sum(denoiser.schedule.coefficients(torch.tensor([now], dtype=torch.float64)))) for now in t]
    seen: list[Tensor] = []
    x0 = ode_solver.to_data(scales[0] * z, t, no_condition(z), lambda _, x: seen.append(x))
    golden.check("trajectory", torch.stack([*(x / scale for x, scale in zip(seen, scales)), x0]))


def rfpp_time_density(golden: GoldenFile) -> None:
    golden.choice("time_sampler", "u_shaped_exponential")
    a, eps = number(golden, "a"), number(golden, "t_eps")
    quantiles = exponential_times(golden["u"], a)
    golden.check("quantiles_exponential", quantiles)
    golden.check("pdf_exponential", density(lambda u: exponential_times(u, a), golden["x"]))
    # One draw on [0, 1) makes both halves of the U: its lower half rises, its upper half is mirrored.
    halves = (lambda u: u_shaped_times(u / 2, a), lambda u: u_shaped_times(1 - u / 2, a))
    golden.check("pdf_u_shaped", sum(density(half, golden["x"]) for half in halves) / 2)
    mirrored = u_shaped_times(0.5 + golden["u"][::3] / 2, a).flip(0)
    golden.check("t_after_flip", uniform_times(mirrored, eps, 1 - eps))


def density(sample, x: Tensor) -> Tensor:
    """The density at ``x`` of a monotonic function of one uniform draw: 1 / |slope| where it gives x."""
    low, high = torch.zeros_like(x), torch.ones_like(x)
    rises = bool(sample(high * 0.75)[0] > sample(high * 0.25)[0])
    for _ in range(60):
        middle = (low + high) / 2
        below = (sample(middle) < x) == rises
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    u = ((low + high) / 2).clamp(1e-12, 1 - 1e-12).requires_grad_()
    (slope,) = torch.autograd.grad(sample(u).sum(), u)
    return 1 / slope.abs()


CASES = {
    "rectified_flow_loss": rectified_flow_loss,
    "rfpp_loss": rfpp_loss,
    "rfpp_sampler": rfpp_sampler,
    "rfpp_time_density": rfpp_time_density,
}
