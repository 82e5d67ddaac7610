"""Variants of the golden files of consistency models, computed here by the README's formulas: they need no code."""

from pathlib import Path
from typing import Any

import consistency_model_cases
import diffusers
import lcm_cases
import pytest
import torch
from torch import Tensor
from variants import Options, Tensors, column, compare, distances, guided, raw, weight

DRAW = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


# --- FastGen's consistency loss ---------------------------------------------------------------------------------------


def fastgen(
    schedule: str = "rf", sigma_data: float = 0.8, c: float | None = None, **changes: Any
) -> tuple[Tensors, Options]:
    """A file's tensors and options: one network, x0 of it at t and, without gradient, at r."""
    options = {
        "distance": "l2_norm",
        "guidance_form": "none",
        "mapping": "sigmoid",
        "mapping_b": 1.0,
        "mapping_k": 8.0,
        "objective": "training",
        "prediction_type": "edm_preconditioned" if schedule == "edm" else "velocity",
        "reduction": "mean",
        "schedule": schedule,
        "sigma_data": sigma_data,
        "solver": "none",
        "target_detached": True,
        "target_network": "student",
        "toy_time": "ln(sigma)/4" if schedule == "edm" else "t",
        "weighting": "1/(t-r)",
        **changes,
    }
    x, noise, cond = normal(3, 2, 4), normal(3, 2, 4), normal(3)
    k = {name: (0.4 * normal(8)).requires_grad_() for name in ("student", "teacher", "target")}
    t = torch.tensor([0.2, 0.5, 0.9] if schedule == "rf" else [0.5, 4.0, 60.0], dtype=torch.float64)
    ratio, min_r, w = 0.97, 0.002, torch.tensor(2.5, dtype=torch.float64)
    share = 1 + 8 * torch.sigmoid(-t) if options["mapping"] == "sigmoid" else 1.0
    r = (t - t * (1 - ratio) * share).clamp(min=min_r)

    def x0(who: str, x_t: Tensor, at: Tensor, c: Tensor) -> Tensor:
        sd = sigma_data
        if schedule == "edm":
            root = (at**2 + sd**2).sqrt()
            said = raw(k[who], x_t / column(root), at.log() / 4, c)
            return column(sd**2 / root**2) * x_t + column(at * sd / root) * said
        said = raw(k[who], x_t, at, c)
        kind = options["prediction_type"]
        if kind == "epsilon":
            return (x_t - column(at) * said) / column(1 - at)
        return x_t - column(at) * (said if kind == "velocity" else -said)

    alpha_t = torch.ones_like(t) if schedule == "edm" else 1 - t
    x_t = column(alpha_t) * x + column(t) * noise
    if options["solver"] == "none":
        x_r = column(torch.ones_like(r) if schedule == "edm" else 1 - r) * x + column(r) * noise
    else:
        both = (x0("teacher", x_t, t, c) for c in (cond, 0 * cond))
        teacher = guided(options["guidance_form"], w, *both)
        velocity = (x_t - teacher) / column(t)  # noise, or noise - x0: dx/dt in either schedule
        x_r = x_t - column(t - r) * velocity
    f_t = x0("student", x_t, t, cond)
    target = "target" if options["target_network"] == "separate" else "student"
    f_r = x0(target, x_r.detach(), r, cond).detach()
    apart = distances(f_t - f_r, c or 0.0)["mse" if options["distance"] == "mse_x0" else options["distance"]]
    each = weight(options["weighting"], t, alpha_t, sigma_data, t, r) * apart
    total = each.mean() * {"mean": 1.0, "half_sum_over_batch_size": 4.0}.get(options["reduction"], 8.0)
    total.backward()
    tensors = {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.x": x, "in.noise": noise, "in.cond": cond, "in.t": t, "in.guidance_scale": w}
    tensors |= {name: torch.tensor(v, dtype=torch.float64) for name, v in (("in.ratio", ratio), ("in.min_r", min_r))}
    tensors |= {} if c is None else {"in.huber_c": torch.tensor(c, dtype=torch.float64)}
    tensors |= {"exp.r": r, "exp.f_t": f_t, "exp.f_r": f_r, "exp.loss_unweighted": apart, "exp.loss_per_sample": each}
    return tensors | {"exp.loss_mean": total, "exp.grad_k_student": k["student"].grad}, options


DISTILLED = {"objective": "distillation", "solver": "euler"}
FASTGEN = [{**DISTILLED, "guidance_form": form, "weighting": w} for form, w in (
    ("u+w*(c-u)", "1/c_out"), ("c+w*(c-u)", "1/c_out^2"), ("none", "1/sigma^2")
)]  # fmt: skip
FASTGEN += [{"schedule": "edm", **DISTILLED, "guidance_form": "c+w*(c-u)"}, {"schedule": "edm", "mapping": "const"}]
FASTGEN += [
    {"weighting": name} for name in ("uniform", "1/sqrt(t-r)", "1/c_out", "1/c_out^2", "1/sigma", "snr/(snr+1)")
]
FASTGEN += [{"weighting": name} for name in ("sigma_squared", "alpha_squared", "1/sin(t)^2", "1/(2.3*max(1-t,0.1))")]
FASTGEN += [{"distance": name} for name in ("mse", "mse_x0", "l1", "l2_norm_squared")]
FASTGEN += [{"distance": name, "c": 0.03} for name in ("pseudo_huber_norm", "pseudo_huber_elementwise")]
FASTGEN += [{"distance": "mse", "reduction": name} for name in ("sum_over_batch_size", "half_sum_over_batch_size")]
FASTGEN += [{"target_network": "separate"}, {"prediction_type": "data_minus_noise"}, {"prediction_type": "epsilon"}]
FASTGEN += [{"toy_time": "sin(t)/(sin(t)+cos(t))"}]  # which for flow matching is t


@pytest.mark.parametrize("changes", FASTGEN, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_fastgens_loss_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, consistency_model_cases.CASES, "cm_fastgen_loss", *fastgen(**changes))


@pytest.mark.parametrize(
    "change",
    [{"weighting": "adaptive"}, {"distance": "barron"}, {"schedule": "vp"}, {"guidance_form": "w*(c-u)"}],
)
def test_an_unknown_choice_fails_by_name(change: dict[str, str], tmp_path: Path):
    ((name, value),) = change.items()
    tensors, options = fastgen()
    with pytest.raises(AssertionError, match=f"unknown {name}"):
        compare(tmp_path, consistency_model_cases.CASES, "cm_fastgen_loss", tensors, {**options, name: value})


def test_an_objective_that_its_solver_contradicts_fails(tmp_path: Path):
    tensors, options = fastgen()
    with pytest.raises(AssertionError, match="objective"):
        compare(
            tmp_path,
            consistency_model_cases.CASES,
            "cm_fastgen_loss",
            tensors,
            {**options, "objective": "distillation"},
        )


# --- LCM --------------------------------------------------------------------------------------------------------------


def lcm(embedded: bool = False, c: float | None = None, **changes: Any) -> tuple[Tensors, Options]:
    """A file's tensors and options: a DDIM step of the guided teacher on LCM's grid."""
    table = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    options = {
        **table,
        "distance": "mse",
        "guidance_form": "c+w*(c-u)",
        "guidance_space": "x0_and_epsilon",
        "guide_teacher": True,
        "num_grid": 20,
        "prediction_type": "v_prediction",
        "reduction": "mean",
        "schedule": "vp",
        "sigma_data": 0.5,
        "solver": "ddim",
        "target_detached": True,
        "target_network": "student",
        "timestep_scaling": 10.0,
        "toy_time": "timestep/1000",
        "w_embedding": "none",
        **({} if c is None else {"huber_c": c}),
        **changes,
    }
    abar = diffusers.DDPMScheduler(**table).alphas_cumprod.double()
    k = {name: (0.3 * normal(8)).requires_grad_() for name in ("student", "teacher", "target")}
    x, noise, cond, uniform = normal(3, 2, 4), normal(3, 2, 4), normal(3), torch.tensor([0.0, 0.4, 1.0]).double()
    index, step = torch.tensor([0, 7, 19]), 1000 // options["num_grid"]
    start = step * (index + 1) - 1
    before = (start - step).clamp(min=0)
    w = 5 + uniform * 10

    def of(t: Tensor) -> tuple[Tensor, Tensor]:
        return column(abar[t].sqrt()), column((1 - abar[t]).sqrt())

    def both(who: str, x_t: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and noise."""
        (alpha, sigma), said = of(t), raw(k[who], x_t, t.double() / 1000, c)
        if options["prediction_type"] == "v_prediction":
            return alpha * x_t - sigma * said, alpha * said + sigma * x_t
        return (x_t - sigma * said) / alpha, said

    def scalings(t: Tensor) -> tuple[Tensor, Tensor]:
        s = 10.0 * t.double()
        return 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()

    def f(who: str, x_t: Tensor, t: Tensor) -> Tensor:
        skip, out = scalings(t)
        return column(skip) * x_t + column(out) * both(who, x_t, t, seen)[0]

    seen = cond
    tensors: Tensors = {}
    if embedded:
        rates = torch.exp(-torch.log(torch.tensor(1e4).double()) / 7 * torch.arange(8, dtype=torch.float64))
        phase = 1000.0 * w[:, None] * rates
        embedding = torch.cat([phase.sin(), phase.cos()], 1)
        seen = cond + 0.1 * embedding[:, 3]
        tensors["exp.w_embedding"] = embedding
        options |= {"w_embedding": "sinusoidal_sin_cos", "w_embedding_dim": 16, "w_embedding_max_period": 1e4}
        options |= {"w_embedding_scale": 1000.0, "toy_condition": "cond+factor*w_embedding[:,column]"}
        options |= {"toy_condition_column": 3, "toy_condition_factor": 0.1}
    alpha, sigma = of(start)
    x_t = alpha * x + sigma * noise
    pairs = zip(both("teacher", x_t, start, cond), both("teacher", x_t, start, 0 * cond))
    form = options["guidance_form"] if options["guide_teacher"] else "none"
    x0, eps = (guided(form, column(w), c, u) for c, u in pairs)
    alpha, sigma = of(before)
    x_prev = (alpha * x0 + sigma * eps).detach()
    said = f("student", x_t, start)
    target = f("target" if options["target_network"] == "separate" else "student", x_prev, before).detach()
    each = distances(said - target, c or 0.0)[options["distance"]]
    factor = {"mean": 1.0, "half_sum_over_batch_size": 4.0}.get(options["reduction"], 8.0)
    loss = factor * (each if options["reduction"] == "sum_per_sample" else each.mean())
    loss.mean().backward()
    tensors |= {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.x": x, "in.noise": noise, "in.cond": cond, "in.index": index, "in.uniform_w": uniform}
    tensors |= {"in.w_range": torch.tensor([5.0, 15.0]).double(), "in.abar_start": abar[start]}
    tensors |= {"in.abar_prev": abar[before], "in.abar_target": abar[before], "exp.w": w, "exp.x_prev": x_prev}
    tensors |= {"exp.timestep": start, "exp.timestep_prev": before, "exp.model_pred": said, "exp.target": target}
    for name, t in (("start", start), ("target", before)):
        tensors[f"exp.c_skip_{name}"], tensors[f"exp.c_out_{name}"] = scalings(t)
    return tensors | {"exp.loss": loss, "exp.grad_k_student": k["student"].grad}, options


LCM = [{}, {"embedded": True}, {"embedded": True, "guidance_form": "u+w*(c-u)", "target_network": "separate"}]
LCM += [{"guide_teacher": False}, {"guidance_form": "none"}, {"guidance_space": "v_prediction"}, {"solver": "euler"}]
LCM += [{"distance": name} for name in ("l1", "l2_norm", "l2_norm_squared")]
LCM += [{"distance": name, "c": 0.1} for name in ("pseudo_huber_norm", "pseudo_huber_elementwise")]
LCM += [{"reduction": name} for name in ("sum_over_batch_size", "half_sum_over_batch_size", "sum_per_sample")]
LCM += [{"prediction_type": "epsilon", "num_grid": 50}]


@pytest.mark.parametrize("changes", LCM, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_lcm_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, lcm_cases.CASES, "lcm_distillation_loss", *lcm(**changes))
