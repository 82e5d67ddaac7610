"""Variants of the golden files of DMD2 and SiD on a table, by the README's formulas: they need no code."""

from pathlib import Path
from typing import Any

import diffusers
import dmd2_cases
import pytest
import sid_cases
import torch
from torch import Tensor
from variants import Options, Tensors, column, compare, guided, raw, weight

DRAW = torch.Generator().manual_seed(0)
TABLE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
ABAR = diffusers.DDPMScheduler(**TABLE).alphas_cumprod.double()
VP: Options = {**TABLE, "schedule": "vp", "toy_time": "timestep/1000"}
FACTORS = {"mean": 1.0, "sum_over_batch_size": 8.0, "half_sum_over_batch_size": 4.0}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def of(t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (B,) of the table's entries."""
    return ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()


def x0_of(kind: str, k: Tensor, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
    (alpha, sigma), said = (column(v) for v in of(t)), raw(k, x_t, t.double() / 1000, c)
    if kind == "v_prediction":
        return alpha * x_t - sigma * said
    if kind in ("velocity", "data_minus_noise"):
        return (x_t - sigma * (said if kind == "velocity" else -said)) / (alpha + sigma)
    return (x_t - sigma * said) / alpha


def in_space(distance: str, kind: str, error: Tensor, t: Tensor) -> Tensor:
    """The mean squared error (B,) of x0, as that of what the distance names."""
    alpha, sigma = of(t)
    if distance == "mse":  # of the network's own output
        distance = {"epsilon": "mse_epsilon", "v_prediction": "mse_v"}.get(kind, "mse_velocity")
    share = {"mse_x0": 1.0, "mse_epsilon": alpha / sigma, "mse_v": 1 / sigma, "mse_velocity": (alpha + sigma) / sigma}
    return share[distance] ** 2 * error.square().flatten(1).mean(1)


def generator(**changes: Any) -> tuple[Tensors, Options]:
    options = {
        **VP,
        "prediction_type": "v_prediction",
        "differentiate_networks": False,
        "guidance_form": "c+w*(c-u)",
        "guide_critic": True,
        "guide_teacher": True,
        "loss_factor": 1.0,
        "normalizer": "mean_abs_x_minus_x0_teacher",
        "normalizer_min": 0.1,
        "reduction": "mean",
        **changes,
    }
    if options["normalizer"] == "none":
        del options["normalizer_min"]
    k, x, noise, cond = {w: 0.3 * normal(8) for w in ("teacher", "critic")}, normal(3, 2, 4), normal(3, 2, 4), normal(3)
    t, w = torch.tensor([20, 500, 950]), torch.tensor(3.0).double()
    alpha, sigma = (column(v) for v in of(t))
    x_t = alpha * x + sigma * noise

    def said(who: str) -> Tensor:
        c, u = (x0_of(options["prediction_type"], k[who], x_t, t, c) for c in (cond, 0 * cond))
        return guided(options["guidance_form"] if options[f"guide_{who}"] else "none", w, c, u)

    teacher, critic = said("teacher"), said("critic")
    g = critic - teacher
    if options["normalizer"] != "none":
        g = g / column((x - teacher).abs().flatten(1).mean(1).clamp(min=options["normalizer_min"]))
    factor = options["loss_factor"] * FACTORS[options["reduction"]]
    tensors = {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.x": x, "in.noise": noise, "in.cond": cond, "in.timestep": t, "in.alphas_cumprod_t": ABAR[t]}
    tensors |= {"in.guidance_scale": w, "exp.x_noisy": x_t, "exp.x0_teacher_cfg": teacher, "exp.x0_critic": critic}
    tensors |= {"exp.loss": factor * g.square().mean(), "exp.dm_direction": g}
    return tensors | {"exp.grad_x": factor * 2 * g / g.numel()}, options


GENERATORS = [{}, {"guide_critic": False, "loss_factor": 0.5}, {"guide_teacher": False}, {"guidance_form": "none"}]
GENERATORS += [{"reduction": name} for name in FACTORS] + [{"normalizer": "none"}, {"normalizer_min": 0.0}]
GENERATORS += [{"prediction_type": kind, "guidance_form": "u+w*(c-u)"} for kind in ("epsilon", "data_minus_noise")]


@pytest.mark.parametrize("changes", GENERATORS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_dmd2s_generator_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, dmd2_cases.CASES, "dmd2_generator_vp", *generator(**changes))


def critic(**changes: Any) -> tuple[Tensors, Options]:
    options = {
        **VP,
        "prediction_type": "epsilon",
        "distance": "mse_x0",
        "guidance_form": "none",
        "loss_factor": 0.5,
        "reduction": "mean",
        "weighting": "uniform",
        **changes,
    }
    k, x, noise, cond = (0.3 * normal(8)).requires_grad_(), normal(3, 2, 4), normal(3, 2, 4), normal(3)
    t, w, kind = torch.tensor([20, 500, 950]), torch.tensor(3.0).double(), options["prediction_type"]
    alpha, sigma = of(t)
    x_t = column(alpha) * x + column(sigma) * noise
    x0 = guided(options["guidance_form"], w, *(x0_of(kind, k, x_t, t, c) for c in (cond, 0 * cond)))
    factor = weight(options["weighting"], sigma, alpha, 0.5, (t + 1).double() / 1000)
    loss = (factor * in_space(options["distance"], kind, x0 - x, t)).mean()
    loss = options["loss_factor"] * FACTORS[options["reduction"]] * loss
    loss.backward()
    tensors = {"in.k_critic": k, "in.x": x, "in.noise": noise, "in.cond": cond, "in.timestep": t}
    tensors |= {"in.alphas_cumprod_t": ABAR[t], "in.guidance_scale": w, "exp.loss": loss, "exp.x0_critic": x0}
    return tensors | {"exp.grad_k_critic": k.grad}, options


CRITICS = [{"distance": name, "prediction_type": kind} for kind in ("epsilon", "v_prediction", "velocity") for name in (
    "mse", "mse_x0", "mse_epsilon", "mse_v", "mse_velocity"
)]  # fmt: skip
CRITICS += [{"weighting": name} for name in ("karras", "sigma_squared", "alpha_squared", "1/c_out", "1/c_out^2")]
CRITICS += [{"weighting": name} for name in ("1/sigma", "1/sigma^2", "1/sin(t)^2", "snr/(snr+1)")]
CRITICS += [{"weighting": "1/(2.3*max(1-t,0.1))"}, *({"reduction": name} for name in FACTORS), {"loss_factor": 1.0}]
CRITICS += [{"guidance_form": form} for form in ("u+w*(c-u)", "c+w*(c-u)")]


@pytest.mark.parametrize("changes", CRITICS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_dmd2s_critic_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, dmd2_cases.CASES, "dmd2_critic_vp", *critic(**changes))


def long_short(**changes: Any) -> tuple[Tensors, Options]:
    """SiD-LSG: a one-step student, its loss through teacher and critic, and its critic's."""
    options = {
        **VP,
        "prediction_type": "v_prediction",
        "critic_distance": "mse_x0",
        "critic_weighting": "uniform",
        "differentiate_networks": True,
        "guidance_form": "c+w*(c-u)",
        "guide_critic": True,
        "guide_critic_in_critic_loss": True,
        "guide_teacher": True,
        "loss_scale": 100.0,
        "normalizer": "mean_abs_y_minus_x0_teacher",
        "normalizer_detached": True,
        "normalizer_min": 1e-5,
        "reduction": "mean",
        "student_input_scale": "sqrt(1-alphas_cumprod_init)",
        "student_timestep": 600,
        **changes,
    }
    kind, kappa, scale = options["prediction_type"], torch.tensor(1.5).double(), torch.tensor(1.2).double()
    k = {name: (0.3 * normal(8)).requires_grad_() for name in ("student", "teacher", "critic")}
    z, noise, cond, t = normal(3, 2, 4), normal(3, 2, 4), normal(3), torch.tensor([20, 500, 950])
    first = torch.full((3,), options["student_timestep"])
    y = x0_of(kind, k["student"], column(of(first)[1]) * z, first, cond)
    (alpha, sigma), total = of(t), FACTORS[options["reduction"]]

    def said(who: str, x_t: Tensor, option: str) -> Tensor:
        c, u = (x0_of(kind, k[who], x_t, t, c) for c in (cond, 0 * cond))
        return guided(options["guidance_form"] if options[option] else "none", kappa, c, u)

    clean = y if options["differentiate_networks"] else y.detach()
    x_t = column(alpha) * clean + column(sigma) * noise
    p, q = said("teacher", x_t, "guide_teacher"), said("critic", x_t, "guide_critic")
    omega = 1.0
    if options["normalizer"] != "none":
        omega = 1 / column((y - p).abs().flatten(1).mean(1).clamp(min=1e-5)).detach()
    elements = omega * (p - q) * ((p - y) - scale * (p - q))
    loss = options["loss_scale"] * total * elements.mean()
    grad_y, grad_student = torch.autograd.grad(loss, (y, k["student"]))
    still = y.detach()
    x0 = said("critic", column(alpha) * still + column(sigma) * noise, "guide_critic_in_critic_loss")
    factor = weight(options["critic_weighting"], sigma, alpha, 0.5, (t + 1).double() / 1000)
    critic_loss = total * (factor * in_space(options["critic_distance"], kind, x0 - still, t)).mean()
    (grad_critic,) = torch.autograd.grad(critic_loss, k["critic"])
    tensors = {f"in.k_{name}": value for name, value in k.items()}
    tensors |= {"in.z": z, "in.noise": noise, "in.cond": cond, "in.timestep": t, "in.alphas_cumprod_t": ABAR[t]}
    tensors |= {"in.alphas_cumprod_init": ABAR[first[0]], "in.kappa": kappa, "in.alpha": scale, "exp.y": y}
    tensors |= {"exp.x0_teacher": p, "exp.x0_critic": q, "exp.loss_generator": loss, "exp.grad_y": grad_y}
    tensors |= {"exp.grad_k_student": grad_student, "exp.loss_critic": critic_loss, "exp.grad_k_critic": grad_critic}
    return tensors, options


LONG_SHORT = [{}, {"guidance_form": "none"}, {"guide_critic": False}, {"guide_critic_in_critic_loss": False}]
LONG_SHORT += [{"differentiate_networks": False}, {"normalizer": "none"}, {"reduction": "half_sum_over_batch_size"}]
LONG_SHORT += [{"critic_distance": d, "critic_weighting": w} for d, w in (
    ("mse_v", "snr/(snr+1)"), ("mse_v", "alpha_squared"), ("mse_v", "uniform"), ("mse_epsilon", "karras")
)]  # fmt: skip
LONG_SHORT += [{"prediction_type": "epsilon", "critic_distance": "mse_epsilon", "guidance_form": "u+w*(c-u)"}]


@pytest.mark.parametrize("changes", LONG_SHORT, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_sid_lsg_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, sid_cases.CASES, "sidlsg_losses_vp", *long_short(**changes))


@pytest.mark.parametrize(
    "change", [{"critic_weighting": "1/(t-r)"}, {"critic_distance": "l1"}, {"guidance_form": "u+w*(v-u)"}]
)
def test_an_unknown_choice_of_sid_fails_by_name(change: dict[str, str], tmp_path: Path):
    ((name, value),) = change.items()
    tensors, options = long_short()
    with pytest.raises(AssertionError, match=f"unknown {name}"):
        compare(tmp_path, sid_cases.CASES, "sidlsg_losses_vp", tensors, {**options, name: value})
