"""Variants of PeRFlow's golden files, computed here in the paper's own words: they pass without new code."""

import itertools
from pathlib import Path
from typing import Any

import diffusers
import perflow_cases
import pytest
import torch
from torch import Tensor
from variants import Tensors, column, compare, raw


def variant(
    windows: int = 5, steps: int = 3, table: dict[str, Any] | None = None, **options: Any
) -> tuple[Tensors, dict]:
    """A file's tensors and options, by the README's formulas."""
    options = {
        "distance": "mse",
        "guidance_form": "none",
        "guidance_scale": 1.0,
        "guide_teacher": False,
        "prediction_type": "ddim_eps",
        "reduction": "mean",
        "schedule": "vp",
        "solver": "ddim",
        "teacher_prediction_type": "epsilon",
        "toy_time": "timestep/1000",
        "weighting": "uniform",
        "num_train_timesteps": 1000,
        **(table or {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        **options,
    }
    generator = torch.Generator().manual_seed(windows)
    x, noise, cond = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 2, 3), (4, 2, 3), (4,)))
    k_teacher, k_student = (0.3 * torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    k_student.requires_grad_()
    uniform = torch.tensor([0.0, 0.35, 0.6001, 0.985], dtype=torch.float64)

    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    abar = diffusers.DDPMScheduler(**{name: options[name] for name in names}).alphas_cumprod.double()
    count = options["num_train_timesteps"]
    t = 1 - (count * uniform).floor() / count
    number = torch.ceil(t * windows - 1e-9)
    start, end = number / windows, (number - 1) / windows
    first, last = (start * count).round().long() - 1, ((end * count).round().long() - 1).clamp(min=0)
    ab_s, ab_e = abar[first], abar[last]

    def teacher(x: Tensor, at: Tensor, ab: Tensor, c: Tensor) -> Tensor:
        """The noise."""
        said, ab = raw(k_teacher, x, at / 1000, c), column(ab)
        kind = options["teacher_prediction_type"]
        if kind == "v_prediction":
            return ab.sqrt() * said + (1 - ab).sqrt() * x
        if kind in ("velocity", "data_minus_noise"):
            flow = said if kind == "velocity" else -said
            return (x + ab.sqrt() * flow) / (ab.sqrt() + (1 - ab).sqrt())
        return said

    def guided(x: Tensor, at: Tensor, ab: Tensor) -> Tensor:
        c = teacher(x, at, ab, cond)
        w, form = options["guidance_scale"], options["guidance_form"]
        if not options["guide_teacher"] or form == "none":
            return c
        u = teacher(x, at, ab, 0 * cond)
        return u + w * (c - u) if form == "u+w*(c-u)" else c + w * (c - u)

    x_s = z = column(ab_s.sqrt()) * x + column((1 - ab_s).sqrt()) * noise
    now = torch.stack(
        [(count - 1 + (start + (end - start) * i / steps - 1) * count).round().long() for i in range(steps)], 1
    )
    then = (now - count // (windows * steps)).clamp(min=0)
    for i in range(steps):
        ab, ab_next = abar[now[:, i]], abar[then[:, i]]
        eps = guided(z, now[:, i].double(), ab)
        y, ratio = z / column(ab.sqrt()), column(((1 - ab) / ab).sqrt())
        there = column(((1 - ab_next) / ab_next).sqrt())
        z = column(ab_next.sqrt()) * (y + (there - ratio) * eps)
    x_e = z
    x_t = x_s + column((t - start) / (end - start)) * (x_e - x_s)
    form = options["prediction_type"]
    if form in ("velocity", "data_minus_noise"):
        target = (x_e - x_s) / column(end - start) * (-1 if form == "data_minus_noise" else 1)
    else:
        lam = (ab_e / ab_s).sqrt()
        gamma = 1 / lam
        eta = (1 - ab_e).sqrt() - (ab_e * (1 - ab_s) / ab_s).sqrt()
        eta = eta if form == "ddim_eps" else -(1 - gamma**2).sqrt() / gamma
        target = (x_e - column(lam) * x_s) / column(eta)
    said = raw(k_student, x_t, t * count / 1000, cond)
    error, c = (said - target).flatten(1), 0.2
    distances = {
        "mse": error.square().mean(1),
        "mse_epsilon": error.square().mean(1),
        "mse_velocity": error.square().mean(1),
        "l1": error.abs().mean(1),
        "l2_norm": error.norm(dim=1),
        "l2_norm_squared": error.square().sum(1),
        "pseudo_huber_norm": (error.square().sum(1) + c**2).sqrt() - c,
        "pseudo_huber_elementwise": ((error.square() + c**2).sqrt() - c).mean(1),
    }
    per_sample = distances[options["distance"]]
    if options["weighting"] != "uniform":
        per_sample = per_sample / (2.3 * (1 - t).clamp(min=0.1))
    factor = {"mean": 1.0, "half_sum_over_batch_size": 3.0}.get(options["reduction"], 6.0)
    loss = factor * (per_sample if options["reduction"] == "sum_per_sample" else per_sample.mean())
    loss.mean().backward()
    tensors = {
        "in.x": x,
        "in.noise": noise,
        "in.cond": cond,
        "in.uniform": uniform,
        "in.num_windows": torch.tensor(windows),
        "in.solver_steps": torch.tensor(steps),
        "in.k_student": k_student,
        "in.k_teacher": k_teacher,
        "in.abar_solver": abar[now],
        "in.abar_solver_prev": abar[then],
        "in.abar_window_start": ab_s,
        "in.abar_window_end": ab_e,
        "exp.t": t,
        "exp.t_start": start,
        "exp.t_end": end,
        "exp.x_start": x_s,
        "exp.x_end": x_e,
        "exp.x_t": x_t,
        "exp.target": target,
        "exp.loss": loss,
        "exp.grad_k_student": k_student.grad,
    }
    if "pseudo_huber" in options["distance"]:
        tensors["in.huber_c"] = torch.tensor(c, dtype=torch.float64)
    return tensors, options


GUIDED = {"guide_teacher": True, "guidance_scale": 3.0}
VARIANTS = [
    {"prediction_type": form, "teacher_prediction_type": teacher, "guidance_form": guidance, **GUIDED}
    for (form, teacher), guidance in zip(
        itertools.product(("ddim_eps", "diff_eps", "velocity"), ("epsilon", "v_prediction")),
        itertools.cycle(("u+w*(c-u)", "c+w*(c-u)", "none")),
    )
]
VARIANTS += [{"teacher_prediction_type": kind} for kind in ("velocity", "data_minus_noise")]
VARIANTS += [{"prediction_type": "data_minus_noise", "guidance_form": "u+w*(c-u)", "guidance_scale": 2.0}]
VARIANTS += [{"weighting": "1/(2.3*max(1-t,0.1))", "reduction": reduction} for reduction in ("mean", "sum_per_sample")]
VARIANTS += [{"reduction": reduction} for reduction in ("sum_over_batch_size", "half_sum_over_batch_size")]
VARIANTS += [{"distance": kind, "prediction_type": "diff_eps"} for kind in perflow_cases.DISTANCES]
VARIANTS += [{"distance": "mse_velocity", "prediction_type": "velocity"}, {"distance": "mse_epsilon"}]
VARIANTS += [{"windows": windows, "steps": steps} for windows, steps in ((1, 1), (2, 7), (3, 4), (10, 2))]
VARIANTS += [
    {"num_train_timesteps": 500},
    {"table": {"beta_schedule": "squaredcos_cap_v2", "beta_start": 1e-4, "beta_end": 0.02}},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(map(str, changes.values())))
def test_a_variant_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, perflow_cases.CASES, "perflow_loss", *variant(**changes))


@pytest.mark.parametrize(
    "change", [{"prediction_type": "sample"}, {"solver": "none"}, {"weighting": "snr"}, {"distance": "barron"}]
)
def test_an_unknown_choice_fails_by_name(change: dict[str, str], tmp_path: Path):
    tensors, options = variant()
    ((name, value),) = change.items()
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, perflow_cases.CASES, "perflow_loss", tensors, {**options, **change})
