"""What words of the golden files mean wherever they stand: guidance, spaces of an error, weights over the time."""

import torch
from golden_file import GoldenFile
from torch import Tensor
from toy_network import toy_conditioning

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.losses.score import denoising_loss, native_weight
from fewstep.networks.guidance import GuidedDenoiser

#: What diffusers' guidance scale, that of u + w (c - u), is more than a file's w.
MORE = {"none": None, "u+w*(c-u)": 0.0, "c+w*(c-u)": 1.0}
#: The space of a mean square, in fewstep's words.
SPACES = {"mse_x0": "sample", "mse_epsilon": "epsilon", "mse_v": "v_prediction", "mse_velocity": "flow"}
#: Factors that depend on one time alone.
TIME_WEIGHTS = ("uniform", "karras", "sigma_squared", "alpha_squared", "1/c_out", "1/c_out^2", "1/sigma", "1/sigma^2")
TIME_WEIGHTS += ("1/sin(t)^2", "snr/(snr+1)", "1/(2.3*max(1-t,0.1))")


def null() -> object:
    """The null condition of one sample."""
    return toy_conditioning(torch.zeros(1, dtype=torch.float64))


def guided(golden: GoldenFile, denoiser: Denoiser, option: str | None = None, name: str = "guidance_scale") -> Denoiser:
    """The denoiser under the file's guidance, where ``option`` says so; its w is ``in.<name>`` or an option."""
    on = option is None or golden.absent(option) or golden.choice(option, True, False)
    more = MORE[golden.choice("guidance_form", *MORE)]
    if more is None or not on:
        return denoiser
    return GuidedDenoiser(denoiser, number(golden, name) + more)


def number(golden: GoldenFile, name: str) -> float:
    """A number that is an option, or a tensor."""
    return golden.number(name) if golden.states(name) else golden[name].item()


def time_weight(name: str, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """One of :data:`TIME_WEIGHTS` at times ``t`` (B,); (B,)."""
    alpha, sigma = schedule.coefficients(t)
    level, data = sigma / alpha, getattr(schedule, "sigma_data", 0.5)
    c_out, power = level * data / (level**2 + data**2).sqrt(), alpha**2 + sigma**2
    return {
        "uniform": torch.ones_like(sigma),
        "karras": level**-2 + data**-2,
        "sigma_squared": sigma**2,
        "alpha_squared": alpha**2,
        "1/c_out": 1 / c_out,
        "1/c_out^2": 1 / c_out**2,
        "1/sigma": 1 / sigma,
        "1/sigma^2": 1 / sigma**2,
        "1/sin(t)^2": power / sigma**2,
        "snr/(snr+1)": alpha**2 / power,
        "1/(2.3*max(1-t,0.1))": 1 / (2.3 * (1 - t).clamp(min=0.1)),
    }[name]


def denoising(
    golden: GoldenFile, schedule: NoiseSchedule, t: Tensor, y: Tensor, x0: Tensor, prefix: str = ""
) -> Tensor:
    """A critic's loss () about ``y`` (B, ...), of which it says ``x0``: by its distance, weighting and reduction."""
    return golden.over_mean(y) * denoising_loss(y, x0, error_weight(golden, schedule, t, prefix))


def error_weight(golden: GoldenFile, schedule: NoiseSchedule, t: Tensor, prefix: str = "") -> Tensor:
    """What the file's distance and weighting make of the squared error of x0, (B,)."""
    kind = golden.kind("prediction_type")[0]
    distance = "mse_x0" if golden.absent(f"{prefix}distance") else golden.choice(f"{prefix}distance", "mse", *SPACES)
    weight = time_weight(golden.choice(f"{prefix}weighting", *TIME_WEIGHTS), schedule, t)
    return weight * native_weight(SPACES.get(distance, kind), schedule, t)
