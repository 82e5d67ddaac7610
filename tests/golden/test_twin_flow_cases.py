"""Variants of TwinFlow's case by its plain formula: they pass without new code, and unknown choices fail."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import twin_flow_cases
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)
GAP = "1+tan((1-(|t|-|r|))*pi/2.5)"
OPTIONS = {
    "adv_weighting": "uniform",
    "batch_parts": "e2e,mul,any,adv",
    "derivative_step": 0.01,
    "distance": "barron",
    "distance_alpha": 1.0,
    "distance_c": 1e-3,
    "distance_eps": 1e-8,
    "guidance_form": "v+w*(c-u)",
    "guidance_t_max": 1.0,
    "guidance_t_min": 0.0,
    "match_factor": 0.5,
    "mul_fraction": 0.05,
    "prediction_type": "velocity",
    "reduction": "mean",
    "schedule": "rf",
    "target_clamp": 1.0,
    "target_detached": True,
    "toy_time": "t",
    "weighting": GAP,
}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=DRAW, dtype=torch.float64)


def column(v: Tensor) -> Tensor:
    return v[:, None, None]


def made(order: int, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file from the formula; ``changes`` of an option to None leave it out."""
    options = {name: value for name, value in (OPTIONS | changes).items() if value is not None}
    parts, each = options["batch_parts"].split(","), 2
    batch, kind = each * len(parts), [part for part in parts for _ in range(each)]
    sign = -1.0 if options["prediction_type"] == "data_minus_noise" else 1.0

    def raw(k: Tensor, x: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
        t, r, c = (column(v) for v in (t, r, c))
        said = (k[0] + k[5] * t + k[6] * r) * x + k[1] * t + k[2] + k[3] * c + k[4] * x.sin() + k[7] * r
        return sign * said

    k, k_teacher = (0.3 * normal(8)).requires_grad_(), 0.3 * normal(8)
    z, cond, t, any_, mul = normal(batch, 2, 3), normal(batch), uniform(batch), uniform(batch), uniform(batch)
    places = {part: torch.tensor([row for row in range(batch) if kind[row] == part]) for part in parts}
    adv, e2e = places["adv"], places["e2e"]
    fakes, match_noise, s = normal(len(adv), 2, 3), normal(len(e2e), 2, 3), uniform(len(e2e))
    tensors = {"noise": z, "cond": cond, "t_draw": t, "u_any": any_, "u_mul": mul, "noise_fake": fakes}
    tensors |= {"noise_match": match_noise, "s_match": s, "k_student": k, "k_teacher": k_teacher}
    w = torch.tensor(options.pop("w", 0.8), dtype=torch.float64)
    tensors |= {"enhanced_ratio": w, "order": torch.tensor(order)}
    one, nothing = torch.ones(batch, dtype=torch.float64), torch.zeros(batch, dtype=torch.float64)
    with torch.no_grad():
        if options.get("image_free"):
            images = normal(batch, 2, 3)
            tensors["noise_images"], x = images, images - raw(k, images, one, nothing, cond)
        else:
            tensors["x"] = x = normal(batch, 2, 3)
        x = x.clone()
        x[adv] = fakes - raw(k, fakes, one[adv], nothing[adv], cond[adv])
    t = torch.tensor([1.0 if kind[row] == "e2e" else float(t[row]) for row in range(batch)], dtype=torch.float64)
    ends = {"e2e": nothing, "one": nothing, "mul": t * (1 - options["mul_fraction"] * mul), "any": t * (1 - any_)}
    r = torch.stack([ends.get(kind[row], t)[row] for row in range(batch)])
    base = torch.tensor([part != "adv" for part in kind])
    sides = torch.where(base, 1.0, -1.0)
    v, x_t = z - x, column(t) * z + column(1 - t) * x
    u = raw(k, x_t, sides * t, sides * r, cond)
    with torch.no_grad():
        asked = k_teacher if options.get("reference") == "frozen" else k
        c, null = raw(asked, x_t, t, t, cond), raw(asked, x_t, t, t, nothing)
        form = {
            "none": v,
            "v+w*(c-u)": v + w * (c - null),
            "v+(1-1/w)*(c-u)": v + (1 - 1 / w) * (c - null),
            "u+w*(c-u)": null + w * (c - null),
            "c+w*(c-u)": c + w * (c - null),
        }[options["guidance_form"]]
        on = base & (t > options["guidance_t_min"]) & (t < options["guidance_t_max"])
        guided = torch.where(column(on), form, v)
        target, step = guided, options["derivative_step"]
        if order:
            middle = torch.maximum(t - step, r)
            y, integral = x_t - step * guided, torch.zeros_like(x_t)
            for j in range(order):
                now, then = (middle + (r - middle) * share / order for share in (j, j + 1))
                move = column(now - then) * raw(k, y, now, then, cond)
                y, integral = y - move, integral + move
            walked = (column(t - r) * u - integral) / step - guided
            residual = torch.where(column(t >= r + step), walked, u - guided)
            limit = options.get("target_clamp", math.inf)
            target = torch.where(column(base), u - residual.clamp(-limit, limit), v)
    constants = [options.get(f"distance_{name}", 0.0) for name in ("alpha", "c", "eps")]

    def far(a: Tensor, b: Tensor) -> Tensor:
        mean = (a - b).square().mean((1, 2))
        if options["distance"] == "mse":
            return mean
        if options["distance"] == "l1":
            return (a - b).abs().mean((1, 2))
        alpha, c, eps = constants
        return mean * (mean.detach() / (c**2 * abs(alpha - 2) + eps) + 1) ** ((alpha - 2) / 2) / c

    weights = {"uniform": one, GAP: 1 + torch.tan((1 - (t - r)) * math.pi / 2.5)}
    weight = torch.where(base, weights[options["weighting"]], weights[options["adv_weighting"]])
    if not order:
        weight = torch.tensor([part in ("mul", "adv") for part in kind]) * weight
        weight = weight * batch / sum(part in ("mul", "adv") for part in kind)
    loss = (far(u, target) * weight).mean()
    with torch.no_grad():
        x_m = column(s) * match_noise + column(1 - s) * (x_t - u)[e2e]
        apart = raw(k, x_m, -s, -s, cond[e2e]) - raw(k, x_m, s, s, cond[e2e])
        apart = apart.clamp(-options.get("target_clamp", math.inf), options.get("target_clamp", math.inf))
    loss = loss + options["match_factor"] * far(u[e2e], (u[e2e] - apart).detach()).mean()
    loss = loss * {"mean": 1.0, "sum_over_batch_size": 6.0}[options["reduction"]]
    (gradient,) = torch.autograd.grad(loss, k)
    found = {f"in.{name}": value for name, value in tensors.items()}
    return found | {"exp.loss": loss, "exp.grad_k_student": gradient}, options


def compare(folder: Path, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": "twinflow_loss", "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest"}
    save_file({name: v.detach().contiguous() for name, v in tensors.items()}, folder / "v.safetensors", metadata)
    golden = GoldenFile(folder / "v.safetensors")
    twin_flow_cases.CASES["twinflow_loss"](golden)
    golden.finish()


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        (2, {}),
        (1, {"distance": "mse", "distance_alpha": None, "distance_c": None, "distance_eps": None}),
        (3, {"distance": "l1", "distance_alpha": None, "distance_c": "none", "distance_eps": None}),
        (0, {"guidance_form": "none"}),
        (2, {"distance_alpha": 0.0, "distance_c": 0.1, "image_free": False, "reference": "none"}),
        (2, {"distance_alpha": 2.0, "distance_eps": 0.0, "reference": "student_no_grad"}),
        (2, {"reference": "frozen", "w": 4.0, "match_factor": 0.75}),
        (2, {"image_free": True, "reference": "frozen", "guidance_form": "u+w*(c-u)", "w": 4.0}),
        (2, {"image_free": True, "guidance_form": "v+w*(c-u)"}),
        (1, {"reference": "frozen", "guidance_form": "c+w*(c-u)", "w": 3.0}),
        (2, {"reference": "student_no_grad", "guidance_form": "u+w*(c-u)", "w": 2.0}),
        (2, {"guidance_form": "v+(1-1/w)*(c-u)", "w": 5.0}),
        (2, {"guidance_t_min": 0.3, "guidance_t_max": 0.7}),
        (2, {"weighting": "uniform", "adv_weighting": GAP}),
        (2, {"target_clamp": None}),
        (2, {"target_clamp": 0.2, "derivative_step": 0.05, "mul_fraction": 0.3}),
        (2, {"batch_parts": "adv,any,e2e,one,mul"}),
        (2, {"prediction_type": "data_minus_noise", "reduction": "sum_over_batch_size"}),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else ",".join(map(str, value.values())) or "other numbers",
)
def test_a_loss_of_other_choices_needs_no_code(order: int, changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, *made(order, **changes))


@pytest.mark.parametrize(
    ("name", "value"), [("guidance_form", "u+w*(v-u)"), ("distance", "cube"), ("reference", "a friend"), ("new", 1)]
)
def test_an_unknown_choice_fails(name: str, value: Any, tmp_path: Path):
    tensors, options = made(1)
    with pytest.raises(AssertionError, match=name):
        compare(tmp_path, tensors, options | {name: value})


def test_another_number_fails(tmp_path: Path):
    tensors, options = made(2)
    with pytest.raises(AssertionError, match="loss is"):
        compare(tmp_path, tensors | {"exp.loss": tensors["exp.loss"] * (1 + 1e-6)}, options)
