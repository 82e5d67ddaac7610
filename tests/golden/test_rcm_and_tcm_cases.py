"""Variants of rCM's and TCM's cases, computed here from their formulas: they pass without new code."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous_variants import col, compare, f64, flow, normal, raw, slope
from torch import Tensor


def rcm(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """rCM's three losses with the options ``changes``, from their written formulas."""
    options: dict[str, Any] = {
        "critic_reduction": "sum_per_sample",
        "critic_weighting": "1/sin(t)^2",
        "derivative": "semi_continuous",
        "derivative_step": 1e-3,
        "dmd_loss_factor": 1.0,
        "dmd_reduction": "sum_per_sample",
        "guidance_form": "u+w*(c-u)",
        "guide_critic": False,
        "guide_teacher": True,
        "normalizer": "mean_abs_y_minus_x0_teacher",
        "normalizer_min": 1e-5,
        "prediction_type": "velocity",
        "rollout_gradient": "last_step",
        "schedule": "rf",
        "scm_loss_scale": 100.0,
        "scm_reduction": "sum_per_sample",
        "sigma_data": 1.0,
        "tangent_norm_eps": 0.1,
        "tangent_normalization": "norm",
        "toy_time": "sin(t)/(sin(t)+cos(t))",
        "warmup_scales_derivative": False,
        "wrapper": "trigflow",
    }
    options |= changes
    names, w, warmup, iteration = ("student", "teacher", "critic"), 1.6, 100, 40
    k = {name: (0.3 * normal(8)).requires_grad_() for name in names}
    out = {name: flow(k[name], 1.0) for name in names}
    x, cond, angle, at_d = (
        normal(2, 2, 3),
        normal(2),
        f64([0.4, 1.2]),
        f64([0.6, 1.0]),
    )
    noise, dmd, crit, times = normal(2, 2, 3), normal(3, 2, 2, 3), normal(3, 2, 2, 3), [math.pi / 2, 1.1]

    def x0(name: str, y: Tensor, at: Tensor, c: Tensor) -> Tensor:
        return col(at.cos()) * y - col(at.sin()) * out[name](y, at, c)

    def guided(f: Callable[[Tensor], Tensor], on: bool) -> Tensor:
        c, u = f(cond), f(0 * cond)
        return (
            {"none": c, "u+w*(c-u)": u + w * (c - u), "c+w*(c-u)": c + w * (c - u)}[options["guidance_form"]]
            if on
            else c
        )

    cos, sin = col(angle.cos()), col(angle.sin())
    y, rate, h = cos * x + sin * noise, cos * sin, options["derivative_step"]
    way = guided(lambda c: out["teacher"](y, angle, c), options["guide_teacher"]).detach()

    def own(y: Tensor, angle: Tensor) -> Tensor:
        return out["student"](y, angle, cond)

    said = own(y, angle)
    if options["derivative"] == "exact":
        change = slope(own, y, angle, (rate * way, rate.flatten()))
    elif options["derivative"] == "semi_continuous":
        change = slope(own, y, angle, (rate * way, 0 * angle))
        change = change + rate * (math.cos(h) * said - own(y, angle - h)) / math.sin(h)
    else:
        turned = math.cos(h) * y - math.sin(h) * way
        change = rate * (math.cos(h) * said - own(turned, angle - h)) / math.sin(h)
    q = iteration / warmup
    g = -cos * (1 - q**2 * sin**2).sqrt() * (said - way)
    g = g - (q * rate * y + (q if options["warmup_scales_derivative"] else 1.0) * change)
    norm = g.flatten(1).norm(dim=1)
    g = g / col(
        {"none": 1 + 0 * norm, "norm": norm + 0.1, "norm/sqrt(dim)": norm / 6**0.5 + 0.1}[
            options["tangent_normalization"]
        ]
    )
    scm_loss = options["scm_loss_scale"] * (said - said.detach() - g.detach()).square().flatten(1)

    def rolled(noises: Tensor) -> Tensor:
        first, second = (f64([t, t]) for t in times)
        with torch.no_grad():
            clean = x0("student", noises[0], first, cond)
        return x0("student", col(second.cos()) * clean + col(second.sin()) * noises[1], second, cond)

    sample = rolled(dmd)
    y_d = (col(at_d.cos()) * sample + col(at_d.sin()) * dmd[2]).detach()
    real, fake = (
        guided(lambda c, name=name: x0(name, y_d, at_d, c), options[f"guide_{name}"]) for name in ("teacher", "critic")
    )
    scale = (sample - real).abs().flatten(1).mean(1).clamp(min=options["normalizer_min"])
    pull = ((fake - real) / col(scale)).detach()
    dmd_loss = options["dmd_loss_factor"] * (sample - (sample - pull).detach()).square().flatten(1)
    y_c = rolled(crit).detach()
    noisy = col(at_d.cos()) * y_c + col(at_d.sin()) * crit[2]
    weight = col(at_d.sin()) ** -2 if options["critic_weighting"] == "1/sin(t)^2" else 1.0
    critic_loss = (weight * (y_c - x0("critic", noisy, at_d, cond)).square()).flatten(1)
    tensors: dict[str, Tensor] = {"exp.x0_rollout": sample}
    for name, entries, learner in (
        ("scm", scm_loss, "student"),
        ("dmd", dmd_loss, "student"),
        ("critic", critic_loss, "critic"),
    ):
        sums = entries.sum(1)
        kinds = {"sum_per_sample": sums, "mean": entries.mean(), "sum_over_batch_size": sums.mean()}
        loss = kinds[options[f"{name}_reduction"]]
        (grad,) = torch.autograd.grad(loss.mean(), k[learner], retain_graph=True)
        tensors |= {f"exp.loss_{name}": loss, f"exp.grad_{name}_k" + "_student" * (learner == "student"): grad}
    tensors |= {f"in.k_{name}": k[name] for name in names}
    tensors |= {"in.x": x, "in.cond": cond, "in.t_G": angle, "in.t_D": at_d, "in.noise_scm": noise}
    tensors |= {"in.dmd_noises": dmd, "in.critic_noises": crit, "in.sim_times": f64(times)}
    tensors |= {"in.guidance": f64(w), "in.warmup": torch.tensor(warmup)}
    return tensors | {"in.iteration": torch.tensor(iteration)}, options


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"derivative": "discrete", "warmup_scales_derivative": True, "guidance_form": "c+w*(c-u)"},
        {
            "derivative": "exact",
            "tangent_normalization": "norm/sqrt(dim)",
            "scm_loss_scale": 7.0,
            "dmd_loss_factor": 0.5,
        },
        {"guide_critic": True, "guide_teacher": False, "tangent_normalization": "none", "critic_weighting": "uniform"},
        {"scm_reduction": "mean", "dmd_reduction": "mean", "critic_reduction": "sum_over_batch_size"},
        {"guidance_form": "none", "normalizer_min": 5.0},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "semi_continuous",
)
def test_an_rcm_of_other_choices_needs_no_code(tmp_path: Path, changes: dict[str, Any]):
    compare(tmp_path, "rcm_losses", *rcm(**changes))


def tcm(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The second stage of TCM with the options ``changes``, of a flow network."""
    options: dict[str, Any] = {
        "boundary_offset": 1e-8,
        "boundary_weight": 0.1,
        "distance": "l2_norm",
        "guidance_form": "none",
        "mapping": "sigmoid",
        "mapping_b": 1.0,
        "mapping_k": 8.0,
        "min_r": 0.002,
        "prediction_type": "velocity",
        "schedule": "rf",
        "target_detached": True,
        "toy_time": "t",
        "weighting": "1/(t-r)",
    }
    options |= changes
    transition, ratio, c = 0.4, 0.97, 0.05
    k = {name: (0.3 * normal(8)).requires_grad_() for name in ("student", "stage1")}
    x, noise, cond = normal(4, 2, 3), normal(4, 2, 3), normal(4)
    t, boundary = f64([0.5, 0.7, 0.95, 0.6]), [1, 3]
    moved = t.clone()
    moved[boundary] = transition + options["boundary_offset"]
    n = (
        1 + options["mapping_k"] * torch.sigmoid(-options["mapping_b"] * moved)
        if options["mapping"] == "sigmoid"
        else 1
    )
    r = (moved * (1 - (1 - ratio) * n)).clamp(min=options["min_r"])

    def h(at: Tensor) -> Tensor:
        x_t = col(1 - at) * x + col(at) * noise
        first, second = (x_t - col(at) * raw(k[name], x_t, at, cond) for name in ("stage1", "student"))
        return torch.where(col(at) >= transition, second, first)

    difference = (h(moved) - h(r).detach()).flatten(1)
    squared = difference.square().sum(1)
    distances = {
        "l2_norm": squared.sqrt(),
        "mse": squared / 6,
        "pseudo_huber_norm": (squared + c**2).sqrt() - c,
        "l2_norm_squared": squared,
    }
    weights = {"1/(t-r)": 1 / (moved - r), "1/sqrt(t-r)": (moved - r) ** -0.5, "uniform": torch.ones(4).double()}
    each = weights[options["weighting"]] * distances[options["distance"]]
    others = [row for row in range(4) if row not in boundary]
    cm, at = each[others].mean(), each[boundary].mean()
    loss = cm + options["boundary_weight"] * at
    (grad,) = torch.autograd.grad(loss, k["student"])
    tensors = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.t": t, "in.boundary_index": torch.tensor(boundary)}
    tensors |= {"in.transition_t": f64(transition), "in.ratio": f64(ratio)}
    tensors |= {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.huber_c": f64(c)} if options["distance"] == "pseudo_huber_norm" else {}
    expected = {"exp.loss": loss, "exp.cm_loss": cm, "exp.loss_boundary": at, "exp.grad_k_student": grad}
    return tensors | expected, options


@pytest.mark.parametrize(
    "changes",
    [
        {"distance": "pseudo_huber_norm", "weighting": "1/sqrt(t-r)"},
        {"mapping": "const", "boundary_weight": 0.7, "boundary_offset": 1e-6, "weighting": "uniform"},
        {"distance": "mse", "mapping_k": 3.0, "mapping_b": 2.0, "min_r": 0.39},
        {"distance": "l2_norm_squared"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_a_second_stage_of_other_choices_needs_no_code(tmp_path: Path, changes: dict[str, Any]):
    compare(tmp_path, "tcm_loss", *tcm(**changes))
