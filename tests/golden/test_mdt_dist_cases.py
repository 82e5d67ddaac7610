"""Variants of MDT-dist's case, computed here by other means: derivatives, norms, guidance, laws of times, weights."""

from pathlib import Path
from typing import Any

import mdt_dist_cases
import pytest
import torch
from torch import Tensor
from variants import column, compare, distances, guided, raw

BASE = {
    "prediction_type": "velocity",
    "schedule": "rf",
    "toy_time": "t",
    "target_detached": True,
    "reduction": "mean",
    "distance": "mse",
    "guidance_form": "c+w*(c-u)",
    "guide_teacher": True,
    "time_sampler": "logit_normal",
    "p_mean": 0.5,
    "p_std": 1.3,
    "sigma_min": 1e-3,
    "t_min": 0.06,
    "derivative": "backward_difference",
    "derivative_step": 0.05,
    "tangent_normalization": "norm",
    "tangent_norm_eps": 0.2,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"derivative": "exact"},
    {"derivative": "exact", "derivative_step": "none", "t_min": 1e-5},
    {"derivative": "finite_difference_central"},
    {"derivative": "finite_difference_renoise", "derivative_step": 0.02},
    {"tangent_normalization": "none", "tangent_norm_eps": "none"},
    {"tangent_normalization": "norm/sqrt(dim)"},
    {"guidance_form": "u+w*(c-u)"},
    {"guidance_form": "none", "guide_teacher": False},
    {"guide_teacher": False},
    {"time_sampler": "uniform", "p_mean": "none", "p_std": "none"},
    {"weight_vd": 0.3, "weight_vm": 2.0},
    {"weight_vd": 0.0},
    {"prediction_type": "data_minus_noise"},
    {"distance": "l1"},
    {"distance": "l2_norm_squared"},
    {"distance": "mse_velocity", "reduction": "sum_over_batch_size"},
]


def drawn(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"x": (3, 2, 4), "noise": (3, 2, 4), "noise_fake": (3, 2, 4), "normal": (3,), "cond": (3,)}
    tensors = {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("k_student", "k_teacher"):
        tensors[name] = torch.cat([0.5 * torch.randn(6, generator=draw, dtype=torch.float64), torch.zeros(2).double()])
    tensors["uniform"] = torch.rand(3, generator=draw, dtype=torch.float64)
    return tensors | {"w_vm": torch.tensor(1.5).double(), "w_vd": torch.tensor(2.5).double()}


def computed(given: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The losses and the gradient, from the formula of the golden files."""
    sign = -1 if options["prediction_type"] == "data_minus_noise" else 1
    k = given["k_student"].clone().requires_grad_()
    n, c, zero = given["noise"], given["cond"], torch.zeros(3, dtype=torch.float64)
    uniform = options["time_sampler"] == "uniform"
    share = given["uniform"] if uniform else torch.sigmoid(options["p_mean"] + options["p_std"] * given["normal"])
    low, s = options["t_min"], options["sigma_min"]
    t, h = low + (1 - low) * share, options["derivative_step"]

    def u(x: Tensor, t: Tensor) -> Tensor:
        return sign * raw(k, x, t, c)

    def answers(x0: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x_t = (1 - column(t)) * x0 + (s + (1 - s) * column(t)) * n
        with torch.no_grad():
            cond, null = (sign * raw(given["k_teacher"], x_t, t, told) for told in (c, zero))
            v = guided(options["guidance_form"], w, cond, null) if options["guide_teacher"] else cond
            if options["derivative"] == "exact":
                g = torch.func.jvp(u, (x_t, t), (v, torch.ones_like(t)))[1]
            elif options["derivative"] == "backward_difference":
                g = (u(x_t, t) - u(x_t - h * v, t - h)) / h
            elif options["derivative"] == "finite_difference_central":
                g = (u(x_t + h * v, t + h) - u(x_t - h * v, t - h)) / (2 * h)
            else:
                step, line = h * column(t), n - x0
                g = (u(x_t + step * line, t * (1 + h)) - u(x_t - step * line, t * (1 - h))) / (2 * step)
            if options["tangent_normalization"] != "none":
                norm = column(g.flatten(1).norm(dim=1))
                root = g[0].numel() ** 0.5 if "sqrt" in options["tangent_normalization"] else 1.0
                g = g / (norm / root + options["tangent_norm_eps"])
            target = v - column(t) * g
        return u(x_t, t), target

    def loss(error: Tensor) -> Tensor:
        each = distances(error, 0.0)[options["distance"].removesuffix("_velocity")]
        return each.mean() * (error[0].numel() if options["reduction"] == "sum_over_batch_size" else 1)

    said, target = answers(given["x"], given["w_vm"])
    matching = options.get("weight_vm", 1.0) * loss(said - target)
    fake = u(given["noise_fake"], torch.ones(3, dtype=torch.float64))
    said, target = answers((given["noise_fake"] - fake).detach(), given["w_vd"])
    distillation = options.get("weight_vd", 1.0) * loss((said - target).detach() + fake - fake.detach())
    (matching + distillation).backward()
    losses = {"exp.loss_vm": matching, "exp.loss_vd": distillation, "exp.loss": matching + distillation}
    return losses | {"exp.grad_k_student": k.grad}


@pytest.mark.parametrize("changed", VARIANTS, ids=lambda changed: ", ".join(map(str, changed.values())) or "base")
def test_every_word_that_can_apply_is_understood(changed: dict[str, Any], tmp_path: Path):
    options = BASE | changed
    given = drawn(len(str(changed)))
    inputs = {f"in.{name}": value for name, value in given.items()}
    compare(tmp_path, mdt_dist_cases.CASES, "mdt_dist_loss", inputs | computed(given, options), options)
