"""Variants of the golden files of rectified flow and of conversions, by the README's formulas: they need no code."""

from pathlib import Path
from typing import Any

import primitive_cases
import pytest
import rectified_flow_cases
import torch
from torch import Tensor
from variants import Options, Tensors, column, compare, raw

DRAW = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def reflow(**changes: Any) -> tuple[Tensors, Options]:
    options = {
        "eps": 1e-2,
        "prediction_type": "velocity",
        "reduction": "mean",
        "schedule": "rf",
        "time_sampler": "uniform",
        "toy_time": "t",
        **changes,
    }
    x, z, k, draw = normal(3, 2, 4), normal(3, 2, 4), (0.3 * normal(8)).requires_grad_(), torch.rand(3).double()
    highest, kind = 1 - options["eps"], options["prediction_type"]
    if options["time_sampler"] == "k_step":
        draw = torch.tensor([0, 2, 1])
        t = highest * (1 - draw.double() / 3)
    else:
        t = (
            highest * (1 - draw)
            if options["time_sampler"] == "uniform"
            else torch.full((3,), highest, dtype=torch.float64)
        )
    x_t = column(1 - t) * x + column(t) * z
    said = raw(k, x_t, t, 0 * t)
    velocity = {
        "velocity": said,
        "data_minus_noise": -said,
        "epsilon": (said - x_t) / column(1 - t),
        "v_prediction": (column(t - (1 - t)) * x_t + said) / column((1 - t) ** 2 + t**2),
    }[kind]
    each = (velocity - (z - x)).square().flatten(1)
    per_sample = {"mean": each.mean(1), "half_sum_over_batch_size": each.sum(1) / 2}.get(
        options["reduction"], each.sum(1)
    )
    per_sample.mean().backward()
    loss = per_sample if options["reduction"] == "sum_per_sample" else per_sample.mean()
    tensors = {"in.x": x, "in.z": z, "in.k_student": k, "in.draw": draw, "exp.t": t}
    return tensors | {"exp.loss": loss, "exp.grad_k_student": k.grad}, options


REDUCTIONS = ("mean", "sum_over_batch_size", "half_sum_over_batch_size", "sum_per_sample")
REFLOW: list[dict[str, Any]] = [{"prediction_type": kind} for kind in ("data_minus_noise", "epsilon", "v_prediction")]
REFLOW += [{"reduction": name} for name in REDUCTIONS]
REFLOW += [{"time_sampler": "t0"}, {"time_sampler": "k_step", "num_steps": 3}]


@pytest.mark.parametrize("changes", REFLOW, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_of_rectified_flow_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, rectified_flow_cases.CASES, "rectified_flow_loss", *reflow(**changes))


@pytest.mark.parametrize("data", [1.0, 0.5])
def test_conversions_under_another_scale_need_no_code(data: float, tmp_path: Path):
    output, x_t, t = normal(2, 3), normal(2, 3), torch.tensor([0.3, 0.8]).double()
    tensors: Tensors = {"in.output": output, "in.x_t": x_t}
    one = torch.ones_like(t)
    families = {
        "edm": (one, t, 0 * one, one),
        "rf": (1 - t, t, -one, one),
        "trig": (t.cos(), data * t.sin(), -t.sin(), data * t.cos()),
    }
    for family, schedule in families.items():
        tensors |= {f"in.t.{family}": t, f"exp.{family}.alpha": schedule[0], f"exp.{family}.sigma": schedule[1]}
        alpha, sigma, d_alpha, d_sigma = (v[:, None] for v in schedule)
        noise = {"x0": (x_t - alpha * output) / sigma, "eps": output}
        noise["flow"] = (output - d_alpha / alpha * x_t) / (d_sigma - d_alpha / alpha * sigma)
        for source in ("x0", "eps", "flow"):
            eps = noise[source]
            x0 = output if source == "x0" else (x_t - sigma * eps) / alpha
            for target, value in (("x0", x0), ("eps", eps), ("flow", d_alpha * x0 + d_sigma * eps)):
                if source != target:
                    tensors[f"exp.{family}.{source}_to_{target}"] = value
    compare(tmp_path, primitive_cases.CASES, "prediction_conversions", tensors, {"flow": "dx/dt", "sigma_data": data})
