"""Variants of the known cases, computed here by other means: they pass without new code, and unknown choices fail."""

import json
from pathlib import Path
from typing import Any

import diffusers
import matching_cases
import pytest
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def compare(folder: Path, case: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "variant.safetensors", metadata)
    golden = GoldenFile(folder / "variant.safetensors")
    matching_cases.CASES[case](golden)
    golden.finish()


def swiftbrush(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A v-prediction network, c + w (c - u) on the teacher alone, another student's time, sums, and null prompts."""
    table = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    abar = diffusers.DDPMScheduler(**table).alphas_cumprod.double()
    k = {name: (0.1 * normal(8)).requires_grad_() for name in ("student", "teacher", "critic")}
    cond, z, noises, w = normal(2), normal(2, 3, 4), (normal(2, 3, 4), normal(2, 3, 4)), 2.0
    steps = torch.tensor([300, 700]), torch.tensor([10, 950])

    def column(x: Tensor) -> Tensor:
        return x.reshape(-1, 1, 1)

    def v(who: str, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        a, t, c = k[who], column(t.double() / 1000), column(c)
        return (a[0] + a[5] * t) * x + a[1] * t + a[2] + a[3] * c + a[4] * x.sin()

    alpha, sigma = (torch.tensor(x, dtype=torch.float64).sqrt() for x in (0.3, 0.7))
    y = alpha * z - sigma * v("student", z, torch.tensor([750, 750]), cond)
    (a, s), (b, r) = ((column(abar[t].sqrt()), column((1 - abar[t]).sqrt())) for t in steps)
    x_t = a * y.detach() + s * noises[0]
    teacher = (1 + w) * v("teacher", x_t, steps[0], cond) - w * v("teacher", x_t, steps[0], 0 * cond)
    difference = (s * x_t + a * teacher) - (s * x_t + a * v("critic", x_t, steps[0], cond))
    g = (a**2 * difference).detach()
    loss = (y - (y - g).detach()).square().sum() / 2
    grad_y, grad_student = torch.autograd.grad(loss, (y, k["student"]))
    noisy = b * y.detach() + r * noises[1]
    error = v("critic", noisy, steps[1], 0 * cond) - (b * noises[1] - r * y.detach())
    critic = error.square().sum() / 2
    (grad_critic,) = torch.autograd.grad(critic, k["critic"])
    tensors = {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.z": z, "in.cond": cond, "in.noise_vsd": noises[0], "in.noise_critic": noises[1]}
    tensors |= {"in.timestep_vsd": steps[0], "in.timestep_critic": steps[1]}
    tensors |= {"in.abar_vsd": abar[steps[0]], "in.abar_critic": abar[steps[1]]}
    tensors |= {"in.guidance_scale": torch.tensor(w).double(), "in.critic_uses_null": torch.tensor(1)}
    tensors |= {"exp.y": y, "exp.loss_vsd": loss, "exp.grad_y": grad_y, "exp.grad_k_student": grad_student}
    tensors |= {"exp.loss_critic": critic, "exp.grad_k_critic": grad_critic}
    options = {**table, "schedule": "vp", "prediction_type": "v_prediction", "toy_time": "timestep/1000"}
    options |= {"critic_distance": "mse_v", "critic_weighting": "uniform", "differentiate_networks": False}
    options |= {"guidance_form": "c+w*(c-u)", "guide_teacher": True, "guide_critic": False}
    options |= {"guide_critic_in_critic_loss": False, "loss_factor": 1.0, "normalizer": "none"}
    options |= {"reduction": "sum_over_batch_size", "student_alphas_cumprod": 0.3, "student_timestep": 750}
    return tensors, options | {"weighting": "alpha_squared"} | changes


def test_a_swiftbrush_of_other_choices_needs_no_code(tmp_path: Path):
    compare(tmp_path, "swiftbrush_losses", *swiftbrush())


@pytest.mark.parametrize("change", [{"weighting": "snr"}, {"critic_distance": "l1"}, {"reduction": "median"}])
def test_an_unknown_choice_of_swiftbrush_fails_by_name(tmp_path: Path, change: dict[str, str]):
    (name, value), *_ = change.items()
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, "swiftbrush_losses", *swiftbrush(**change))


def test_an_f_distill_of_one_head_and_three_bins_needs_no_code(tmp_path: Path):
    x, teacher, critic, logits, t = normal(4, 5), normal(4, 5), normal(4, 5), 2 * normal(4, 1), torch.rand(4).double()
    rho = logits.mean(1).clamp(-1, 1).exp().clamp(0.5, 2)
    place = ((t - 0.2) / 0.6 * 3).floor().long().clamp(0, 2)
    bins = torch.full((3,), 2.0).double()
    for k in place.unique():
        own = rho[place == k]
        bins[k] = 0.25 * 2.0 + 0.75 * own.sum() / (len(own) + 1e-3)
    tensors = {
        "in.x": x,
        "in.x0_teacher": teacher,
        "in.x0_critic": critic,
        "in.logits": logits,
        "in.t": t,
        "exp.bins": bins,
    }
    for suffix, ratio in (("", rho), (".binned", rho / (bins[place] + 1e-3))):
        h = ratio / (1 + ratio)
        tensors[f"exp.h.js{suffix}"] = h = h / (h.mean() + 1e-2)
        g = h[:, None] * (critic - teacher) / ((x - teacher).abs().mean(1, keepdim=True) + 0.1)
        tensors |= {f"exp.loss.js{suffix}": 0.5 * g.square().mean(), f"exp.grad_x.js{suffix}": g / g.numel()}
    options = {
        "bin_eps": 1e-3,
        "bin_init": 2.0,
        "bin_momentum": 0.25,
        "bin_t_max": 0.8,
        "bin_t_min": 0.2,
        "num_bins": 3,
    }
    options |= {"head_reduction": "mean", "logit_clamp": 1.0, "ratio_max": 2.0, "ratio_min": 0.5}
    options |= {
        "rkl_weight": "ones",
        "loss_factor": 0.5,
        "normalizer": "mean_abs_x_minus_x0_teacher",
        "normalizer_eps": 0.1,
    }
    options |= {"reduction": "mean", "weight_norm": "batch_mean", "weight_norm_eps": 1e-2}
    compare(tmp_path, "f_distill_weights_and_loss", tensors, options)


def test_a_phased_target_of_noise_where_the_variance_is_clamped_needs_no_code(tmp_path: Path):
    x_s, noise, s, t = (
        normal(2, 3),
        normal(2, 3),
        torch.tensor([0.5, 0.0]).double(),
        torch.tensor([0.5001, 0.3]).double(),
    )
    alpha = (1 - t) / (1 - s)
    sigma = (t**2 - alpha**2 * s**2).clamp(min=1e-2).sqrt()
    tensors = {"in.x_s": x_s, "in.noise": noise, "in.s": s, "in.t": t, "exp.alpha_ts": alpha, "exp.sigma_ts": sigma}
    tensors["exp.x_t"] = alpha[:, None] * x_s + sigma[:, None] * noise
    tensors["exp.epsilon_target"] = (t / sigma)[:, None] * noise
    options = {"prediction_type": "epsilon", "schedule": "rf", "variance_min": 1e-2}
    compare(tmp_path, "phased_dmd_velocity_target", tensors, options)
