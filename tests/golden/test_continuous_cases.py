"""Variants of sCM's case, computed here from its formula: they pass without new code, and unknown choices fail."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from continuous_variants import col, compare, edm, f64, flow, normal, slope
from torch import Tensor


def scm(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """sCM's loss with the options ``changes``, from its written formula."""
    options: dict[str, Any] = {
        "derivative": "exact",
        "distance": "mse",
        "divide_by_dim": False,
        "guidance_form": "u+w*(c-u)",
        "log_variance": "a0+a1*t_native",
        "objective": "distillation",
        "prediction_type": "edm_preconditioned",
        "reduction": "mean",
        "schedule": "edm",
        "tangent_norm_eps": 0.1,
        "tangent_normalization": "norm",
        "tangent_warmup": 10000,
        "target_detached": True,
        "toy_time": "ln(sigma)/4",
        "weighting": "1/sigma",
        "wrapper": "trigflow",
    }
    options = {name: value for name, value in (options | changes).items() if value is not None}
    rf = options["schedule"] == "rf"
    native = f64([0.2, 0.5, 0.9] if rf else [0.2, 1.0, 20.0])
    sd, w, x, noise, cond, iteration = 0.5, 1.7, normal(3, 2, 3), normal(3, 2, 3), normal(3), 4000
    k_student, k_teacher = (0.3 * normal(8)).requires_grad_(), 0.3 * normal(8)
    alpha = 1 - native if rf else torch.ones(3).double()
    made = (lambda k: flow(k, sd, options["prediction_type"] == "epsilon")) if rf else (lambda k: edm(k, sd))
    angle, z = torch.atan2(native, alpha * sd), sd * noise
    cos, sin = col(angle.cos()), col(angle.sin())
    y, of_data = cos * x + sin * z, cos * z - sin * x
    student, teacher, direction = made(k_student), made(k_teacher), of_data
    if options["objective"] == "distillation":
        c, u = teacher(y, angle, cond), teacher(y, angle, 0 * cond)
        forms = {"none": c, "u+w*(c-u)": u + w * (c - u), "c+w*(c-u)": c + w * (c - u)}
        direction = sd * forms[options["guidance_form"]]
    rate, h = cos * sin, options.get("derivative_step", 0.0)

    def own(y: Tensor, angle: Tensor) -> Tensor:
        return student(y, angle, cond)

    kind = options["derivative"]
    if kind == "exact":
        jvp = slope(own, y, angle, (rate * direction, rate.flatten()))
    elif kind == "finite_difference_central":
        jvp = rate * (own(y + h * direction, angle + h) - own(y - h * direction, angle - h)) / (2 * h)
    elif kind == "backward_difference":
        jvp = rate * (own(y, angle) - own(y - h * direction, angle - h)) / h
    else:
        both = [own(col(at.cos()) * x + col(at.sin()) * z, at) for at in (angle * (1 + h), angle * (1 - h))]
        jvp = rate * (both[0] - both[1]) / (2 * col(h * angle))
    said, warmup = own(y, angle), options["tangent_warmup"]
    q = min(1.0, iteration / warmup) if warmup else 1.0
    g = -(cos**2) * (sd * said - direction) - q * (rate * y + sd * jvp)
    norm = g.flatten(1).norm(dim=1)
    lengths = {"none": 1 + 0 * norm, "norm": norm + 0.1, "norm/sqrt(dim)": norm / math.sqrt(6) + 0.1}
    g = (g / col(lengths[options["tangent_normalization"]])).detach()
    apart = (said - said.detach() - g).square().flatten(1).mean(1)
    loss = apart / {"1/sigma": native, "1/sigma^2": native**2, "uniform": 1.0}[options["weighting"]]
    loss = loss / 6 if options["divide_by_dim"] else loss
    if options.get("log_variance", "none") != "none":
        variance = 0.1 + 0.02 * native
        loss = (-variance).exp() * loss + variance
    (grad,) = torch.autograd.grad(loss.mean(), k_student)
    tensors = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.t_native": native, "in.k_student": k_student}
    tensors |= {"in.sigma_data": f64(sd), "in.iteration": torch.tensor(iteration)}
    tensors |= {"in.logvar_coef": f64([0.1, 0.02]), "in.k_teacher": k_teacher}
    tensors |= {"in.guidance_scale": f64(w), "exp.t_trig": angle, "exp.dxdt": direction}
    tensors |= {"exp.F_student": said, "exp.jvp": jvp, "exp.loss_unweighted": apart, "exp.loss_per_sample": loss}
    return tensors | {"exp.loss_mean": loss.mean(), "exp.grad_k_student": grad}, options


RF = {"schedule": "rf", "prediction_type": "velocity", "toy_time": "t"}
FROM_DATA = {"objective": "training", "guidance_form": "none"}


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_form": "c+w*(c-u)", "tangent_normalization": "none"},
        {"guidance_form": "none", "divide_by_dim": True},
        {"derivative": "finite_difference_renoise", "derivative_step": 1e-3, "tangent_normalization": "norm/sqrt(dim)"},
        {"derivative": "finite_difference_central", "derivative_step": 1e-3, **FROM_DATA},
        {"derivative": "backward_difference", "derivative_step": 1e-3, "log_variance": "none"},
        {"tangent_warmup": 0, "weighting": "uniform", "log_variance": None, **FROM_DATA},
        {**RF, "weighting": "1/sigma^2"},
        {**RF, "prediction_type": "epsilon", "derivative": "finite_difference_renoise", "derivative_step": 1e-3},
        {**RF, **FROM_DATA, "tangent_normalization": "norm/sqrt(dim)"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_an_scm_of_other_choices_needs_no_code(tmp_path: Path, changes: dict[str, Any]):
    compare(tmp_path, "scm_fastgen_loss", *scm(**changes))


@pytest.mark.parametrize(
    "change", [{"tangent_normalization": "max"}, {"derivative": "guess"}, {"wrapper": "rf"}, {"weighting": "snr"}]
)
def test_an_unknown_choice_fails_by_name(tmp_path: Path, change: dict[str, str]):
    ((name, value),) = change.items()
    tensors, options = scm()
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, "scm_fastgen_loss", tensors, options | change)
