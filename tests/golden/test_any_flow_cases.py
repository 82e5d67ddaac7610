"""Variants of AnyFlow's cases by plain formulas: they pass without new code, and unknown choices fail."""

import json
from pathlib import Path
from typing import Any

import any_flow_cases
import pytest
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)
TOY = {"prediction_type": "velocity", "schedule": "rf", "toy_time": "t", "reduction": "mean"}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=DRAW, dtype=torch.float64)


def raw(k: Tensor, x: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """The toy network of the golden files, restated."""
    t, r, c = (v.reshape(-1, *[1] * (x.dim() - 1)) for v in (t, r, c))
    return (k[0] + k[5] * t + k[6] * r) * x + k[1] * t + k[2] + k[3] * c + k[4] * x.sin() + k[7] * r


def compare(folder: Path, case: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    save_file({name: v.detach().contiguous() for name, v in tensors.items()}, folder / "v.safetensors", metadata)
    golden = GoldenFile(folder / "v.safetensors")
    any_flow_cases.CASES[case](golden)
    golden.finish()


def shifted(q: Tensor, k: float) -> Tensor:
    return k * q / (1 + (k - 1) * q)


def column(v: Tensor) -> Tensor:
    return v[:, None, None]


MAP = {
    "derivative": "finite_difference_central",
    "derivative_divided_by_guidance_scale": True,
    "derivative_step": 0.01,
    "distance": "mse",
    "guidance_form": "(c+(w-1)*u)/w",
    "r_equals_t_fraction": 0.25,
    "r_zero_fraction": 0.125,
    "rebalance": "mean_of_r_equals_t/own",
    "rebalance_eps": 1e-3,
    "target_detached": True,
    "time_sampler": "max_min_of_two_uniforms",
    "velocity_source": "data",
    "weight_grid": 400,
    "weighting": "exp(-2*(t-1/2)^2)",
    **TOY,
}


def mapped(shift: float, scale: float, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage 1 from its formula."""
    options = MAP | changes
    batch, h = 8, options.get("derivative_step", 0.0)
    k, k_teacher = (0.3 * normal(8)).requires_grad_(), 0.3 * normal(8)
    k_teacher[6:] = 0
    x, noise, cond, uniforms = normal(batch, 2, 3), normal(batch, 2, 3), normal(batch), uniform(batch, 2)
    t, r = (shifted(q, shift) for q in (uniforms.max(1).values, uniforms.min(1).values))
    equal, zero = round(options["r_equals_t_fraction"] * batch), round(options["r_zero_fraction"] * batch)
    r[:equal] = t[:equal]
    r[equal : equal + zero] = 0
    x_t, null = (1 - column(t)) * x + column(t) * noise, torch.zeros(batch, dtype=torch.float64)
    form = options["guidance_form"]
    v = noise - x
    if options["velocity_source"] == "teacher":
        c, u = (raw(k_teacher, x_t, t, 0 * t, which) for which in (cond, null))
        v = {"none": c, "u+w*(c-u)": u + scale * (c - u), "c+w*(c-u)": c + scale * (c - u)}[form]
    fused = form == "(c+(w-1)*u)/w"
    said = raw(k, x_t, t, r, cond)
    prediction = (said + (scale - 1) * raw(k, x_t, t, r, null).detach()) / scale if fused else said
    divided = scale if fused and options["derivative_divided_by_guidance_scale"] else 1.0
    if options["derivative"] == "exact":
        _, change = torch.func.jvp(lambda x, t: raw(k.detach(), x, t, r, cond), (x_t, t), (v, torch.ones_like(t)))
    else:
        step = t * h if options["derivative"] == "finite_difference_renoise" else torch.full_like(t, h)
        later = 0 if options["derivative"] == "backward_difference" else 1
        ahead = raw(k, x_t + later * column(step) * v, t + later * step, r, cond)
        change = (ahead - raw(k, x_t - column(step) * v, t - step, r, cond)) / column((1 + later) * step)
    change = change.detach() / divided
    q = shifted(1 - torch.arange(options["weight_grid"] + 1, dtype=torch.float64) / options["weight_grid"], shift)
    y = {"uniform": q**0, "t*sqrt(1-t)": q * (1 - q).sqrt(), "exp(-2*(t-1/2)^2)": torch.exp(-2 * (q - 0.5) ** 2)}
    table = y[options["weighting"]]
    if options["weighting"].startswith("exp"):
        table = table - table.min()
    if options["weighting"] != "uniform":
        table = table * options["weight_grid"] / table.sum()
    weight = torch.stack([table[(q - time).abs().argmin()] for time in t])
    each = weight * (prediction - (v - column(t - r) * change)).square().mean((1, 2))
    brought = each
    if options["rebalance"] != "none":
        factor = each[:equal].mean().detach() / (each.detach() + options["rebalance_eps"])
        brought = torch.cat([each[:equal], (each * factor)[equal:]])
    loss = brought.mean()
    (gradient,) = torch.autograd.grad(loss, k)
    tensors = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.uniforms": uniforms, "in.k_student": k}
    tensors |= {"in.k_teacher": k_teacher, "in.guidance_scale": torch.tensor(scale), "in.shift": torch.tensor(shift)}
    tensors |= {"exp.t": t, "exp.r": r, "exp.derivative": change, "exp.weight": weight, "exp.loss": loss}
    return tensors | {"exp.loss_per_sample": each, "exp.grad_k_student": gradient}, options


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weighting": "t*sqrt(1-t)", "rebalance": "none"},
        {"weighting": "uniform", "derivative": "exact", "derivative_step": 0.0},
        {"derivative": "backward_difference", "derivative_divided_by_guidance_scale": False},
        {"derivative": "finite_difference_renoise", "guidance_form": "none"},
        {"velocity_source": "teacher", "guidance_form": "u+w*(c-u)"},
        {"velocity_source": "teacher", "guidance_form": "c+w*(c-u)", "derivative": "exact"},
        {"r_equals_t_fraction": 0.75, "r_zero_fraction": 0.0},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "other numbers",
)
def test_a_map_loss_of_other_choices_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, "anyflow_map_loss", *mapped(3.0, 2.5, **changes))


POLICY = {
    "critic_distance": "mse_velocity",
    "critic_time_sampler": "logit_normal",
    "critic_weighting": "uniform",
    "differentiate_networks": False,
    "guidance_form": "c+w*(c-u)",
    "guide_critic": False,
    "guide_teacher": True,
    "loss_factor": 0.5,
    "nan_to_num": False,
    "normalizer": "mean_abs_x_minus_x0_teacher",
    "normalizer_min": 0.7,
    "p_mean": -0.3,
    "p_std": 0.8,
    "rollout_gradient": "all_segments",
    "solver": "flow_map",
    "student_time": "two",
    "time_sampler": "uniform",
    **TOY,
}


def rolled(k: Tensor, x: Tensor, cond: Tensor, count: int, index: int, options: dict[str, Any], shift: float) -> Tensor:
    q = shifted(1 - torch.arange(count + 1, dtype=torch.float64) / count, shift)
    steps = [(a, b) for a, b in ((0, index), (index, index + 1), (index + 1, count)) if a != b]
    for number, (a, b) in enumerate(steps):
        if options["rollout_gradient"] == "all_after_detached_first" and number == 1:
            x = x.detach()
        if options["rollout_gradient"] == "last_segment" and number == len(steps) - 1:
            x = x.detach()
        t, r = (q[place].expand(len(x)) for place in (a, b))
        x = x - (q[a] - q[b]) * raw(k, x, t, r if options["student_time"] == "two" else t, cond)
    return x


def on_policy(count: int, index: int, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage 2 from its formula."""
    options, batch, shift, scale = POLICY | changes, 3, 2.0, 1.5
    k, k_critic, k_teacher = ((0.3 * normal(8)).requires_grad_() for _ in range(3))
    with torch.no_grad():
        for one in (k_critic, k_teacher):
            one[6:] = 0
    cond, null = normal(batch), torch.zeros(batch, dtype=torch.float64)
    start, noise, start_critic, noise_critic = (normal(batch, 2, 3) for _ in range(4))
    u, n, u_critic, n_critic = uniform(batch), normal(batch), uniform(batch), normal(batch)

    def times(sampler: str, u: Tensor, n: Tensor) -> Tensor:
        drawn = u if sampler == "uniform" else torch.sigmoid(options["p_mean"] + options["p_std"] * n)
        return shifted(drawn, shift)

    def clean(k: Tensor, guide: bool) -> Tensor:
        c, u = (raw(k, x_t, t, 0 * t, which) for which in (cond, null))
        forms = {"none": c, "u+w*(c-u)": u + scale * (c - u), "c+w*(c-u)": c + scale * (c - u)}
        return x_t - column(t) * (forms[options["guidance_form"]] if guide else c)

    x0 = rolled(k, start, cond, count, index, options, shift)
    t = times(options["time_sampler"], u, n)
    x_t = ((1 - column(t)) * x0 + column(t) * noise).detach()
    teacher, critic = clean(k_teacher, options["guide_teacher"]), clean(k_critic, options["guide_critic"])
    size = {
        "none": torch.ones(batch, 1, 1, dtype=torch.float64),
        "mean_abs_x_minus_x0_teacher": (x0 - teacher).abs().mean((1, 2), keepdim=True),
        "mean_abs_x_t_minus_x0_teacher": (x_t - teacher).abs().mean((1, 2), keepdim=True),
    }[options["normalizer"]]
    direction = ((critic - teacher) / size.clamp(min=options["normalizer_min"])).detach()
    if options["normalizer"] == "none":
        direction = (critic - teacher).detach()
    loss = options["loss_factor"] * (x0 - (x0 - direction).detach()).square().mean()
    grad_x, grad_k = torch.autograd.grad(loss, (x0, k))
    y = rolled(k, start_critic, cond, 4, 1, options, shift).detach()
    s = times(options["critic_time_sampler"], u_critic, n_critic)
    y_s = (1 - column(s)) * y + column(s) * noise_critic
    error = raw(k_critic, y_s, s, 0 * s, cond) - (noise_critic - y)
    error = {"mse_velocity": error, "mse_x0": column(s) * error, "mse_epsilon": column(1 - s) * error}[
        options["critic_distance"]
    ]
    weight = {"uniform": s**0, "sigma_squared": s**2}[options["critic_weighting"]]
    loss_critic = (column(weight) * error.square()).mean()
    (grad_critic,) = torch.autograd.grad(loss_critic, k_critic)
    tensors = {"in.noise_initial": start, "in.noise": noise, "in.cond": cond, "in.shift": torch.tensor(shift)}
    tensors |= {"in.noise_initial_critic": start_critic, "in.noise_critic": noise_critic}
    tensors |= {"in.uniform": u, "in.normal": n, "in.uniform_critic": u_critic, "in.normal_critic": n_critic}
    numbers = {"num_steps": count, "index": index, "num_steps_critic": 4, "index_critic": 1}
    tensors |= {f"in.{name}": torch.tensor(value) for name, value in numbers.items()}
    tensors |= {"in.k_student": k, "in.k_critic": k_critic, "in.k_teacher": k_teacher}
    tensors |= {"in.guidance_scale": torch.tensor(scale).double()}
    tensors |= {"exp.x0": x0, "exp.t": t, "exp.x_t": x_t, "exp.dm_direction": direction, "exp.loss_student": loss}
    tensors |= {"exp.grad_x": grad_x, "exp.grad_k_student": grad_k}
    return tensors | {"exp.loss_critic": loss_critic, "exp.grad_k_critic": grad_critic}, options


@pytest.mark.parametrize(
    ("count", "index", "changes"),
    [
        (1, 0, {}),
        (16, 15, {"guidance_form": "u+w*(c-u)", "critic_time_sampler": "uniform"}),
        (50, 20, {"guide_critic": True, "time_sampler": "logit_normal", "normalizer_min": 0.0}),
        (8, 3, {"normalizer": "mean_abs_x_t_minus_x0_teacher", "critic_distance": "mse_x0"}),
        (8, 3, {"normalizer": "none", "critic_distance": "mse_epsilon", "loss_factor": 1.0}),
        (8, 3, {"rollout_gradient": "all_after_detached_first", "critic_weighting": "sigma_squared"}),
        (8, 3, {"rollout_gradient": "last_segment", "student_time": "one", "guide_teacher": False}),
    ],
)
def test_an_on_policy_loss_of_other_choices_needs_no_code(count: int, index: int, changes: dict, tmp_path: Path):
    compare(tmp_path, "anyflow_onpolicy_losses", *on_policy(count, index, **changes))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("anyflow_map_loss", {"time_sampler": "karras"}),
        ("anyflow_map_loss", {"rebalance": "median"}),
        ("anyflow_onpolicy_losses", {"solver": "heun"}),
        ("anyflow_onpolicy_losses", {"rollout_gradient": "random"}),
    ],
)
def test_an_unknown_choice_fails_by_name(case: str, change: dict[str, str], tmp_path: Path):
    ((name, value),) = change.items()
    tensors, options = mapped(3.0, 2.5) if "map" in case else on_policy(8, 3)
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, case, tensors, options | change)
