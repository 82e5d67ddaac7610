"""Variants of CDM's and DP-DMD's cases by plain formulas: they pass without new code, and unknown choices fail."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import walk_cases
from torch import Tensor
from variants import Options, Tensors, column, compare, guided, raw

DRAW = torch.Generator().manual_seed(0)
TOY = {"prediction_type": "velocity", "schedule": "rf", "toy_time": "t", "reduction": "mean", "solver": "euler"}
TOY |= {"differentiate_networks": False, "guide_critic": False, "guide_teacher": True}
BATCH = 4


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return 0.02 + 0.96 * torch.rand(*shape, generator=DRAW, dtype=torch.float64)


def coefficients() -> list[Tensor]:
    """Of student, teacher and critic."""
    return [(0.3 * normal(8) * torch.tensor([1.0] * 6 + [0.0] * 2)).requires_grad_() for _ in range(3)]


def size(name: str, x: Tensor, x_t: Tensor, teachers: dict[str, Tensor]) -> Tensor | None:
    """What a ``normalizer`` of the vocabulary is, before it is bounded."""
    if name == "none":
        return None
    first, second = name.removeprefix("mean_abs_").split("_minus_x0_")
    return ({"x": x, "y": x, "x_t": x_t}[first] - teachers[second]).abs().mean((1, 2), keepdim=True)


def critic_loss(options: Options, k: Tensor, y: Tensor, s: Tensor, noise: Tensor, cond: Tensor) -> Tensor:
    error = raw(k, (1 - column(s)) * y + column(s) * noise, s, cond) - (noise - y)
    spaces = {"mse_velocity": torch.ones_like(s), "mse": torch.ones_like(s), "mse_x0": s, "mse_epsilon": 1 - s}
    weights = {"uniform": torch.ones_like(s), "sigma_squared": s**2, "alpha_squared": (1 - s) ** 2}
    weights["snr/(snr+1)"] = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    scale = spaces[options["critic_distance"]] ** 2 * weights[options["critic_weighting"]]
    return (column(scale) * error.square()).mean()


CDM = {
    "critic_distance": "mse_velocity",
    "critic_weighting": "uniform",
    "critic_x0": "trajectory_prediction",
    "distance": "mse_x0",
    "guidance_form": "w*(c-u)",
    "guidance_normalizer": "mean_abs_x_minus_x0_teacher_cond",
    "loss_factor": 1.0,
    "normalizer": "mean_abs_x_minus_x0_teacher",
    "normalizer_clamp": 0.3,
    "normalizer_eps": 1e-3,
    "off_trajectory": "extrapolated_along_velocity",
    "off_trajectory_base": "none",
    "off_trajectory_teacher_base": "student_prediction",
    "off_trajectory_teacher_time": "independent",
    **TOY,
}


def cdm(**changes: Any) -> tuple[Tensors, Options]:
    """CDM from its formula; every term has indices of its own."""
    options, w = CDM | changes, 2.5
    k, k_teacher, k_critic = coefficients()
    cond, null, start = normal(BATCH), torch.zeros(BATCH, dtype=torch.float64), normal(BATCH, 2, 3)
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    x, points, velocities, said = start, [], [], []
    for now, then in pairwise(sigmas):
        v = raw(k, x, now.expand(BATCH), cond).detach()
        points, velocities, said = [*points, x], [*velocities, v], [*said, x - now * v]
        x = x + (then - now) * v
    end, rows = x, torch.arange(BATCH)
    points, velocities, said = (torch.stack(of) for of in (points, velocities, said))
    tensors = {"in.noise_initial": start, "in.cond": cond, "in.sigmas": sigmas, "exp.trajectory_end": end}

    def given(name: str, value: Tensor) -> Tensor:
        tensors[f"in.{name}"] = value
        return value

    update = {"w*(c-u)": w, "c+w*(c-u)": w, "u+w*(c-u)": w - 1, "none": 0.0}[options["guidance_form"]]
    total = torch.zeros((), dtype=torch.float64)
    for name in ("ca", "dm", "cdm"):
        index = given(f"index_{name}", torch.randint(0, 4, (BATCH,), generator=DRAW))
        at, s, base = points[index, rows], sigmas[index], said[index, rows]
        if name == "cdm" and options["off_trajectory"] != "trajectory_point":
            s_old, s = s, given("sigma_student_cdm", uniform(BATCH))
            at = at + column(s - s_old) * velocities[index, rows]
            if options["off_trajectory"] == "renoised":
                clean = end if options["off_trajectory_base"] == "final_sample" else base
                at = (1 - column(s)) * clean + column(s) * given("noise_student_cdm", normal(BATCH, 2, 3))
        y = at - column(s) * raw(k, at, s, cond)
        a = s
        if name != "cdm" or options["off_trajectory_teacher_time"] == "independent":
            a = given(f"sigma_teacher_{name}", uniform(BATCH))
        noised = {"student_prediction": y, "final_sample": end, "trajectory_prediction": base}
        noised = y if name != "cdm" else noised[options["off_trajectory_teacher_base"]]
        x_t = (1 - column(a)) * noised + column(a) * given(f"noise_{name}", normal(BATCH, 2, 3))
        c, u = (x_t - column(a) * raw(k_teacher, x_t, a, which) for which in (cond, null))
        critic = x_t - column(a) * raw(k_critic, x_t, a, cond)
        away = c - critic if name != "ca" else update * (c - u)
        teachers = {"teacher_cond": c, "teacher": c if name != "ca" else c + update * (c - u)}
        normalizer = size(options["guidance_normalizer" if name == "ca" else "normalizer"], y, x_t, teachers)
        if normalizer is not None:
            away = away / (normalizer + options["normalizer_eps"]).clamp(min=options["normalizer_clamp"])
        loss = options["loss_factor"] * (y - (y + away).detach()).square().mean()
        tensors[f"exp.loss_{name}"] = loss
        total = total + given(f"weight_{name}", torch.tensor(0.5 + len(name), dtype=torch.float64)) * loss
    tensors["exp.loss_student"] = total
    (tensors["exp.grad_k_student"],) = torch.autograd.grad(total, k)
    index = given("index_critic", torch.randint(0, 4, (BATCH,), generator=DRAW))
    y = end if options["critic_x0"] == "final_sample" else said[index, rows]
    s, noise = given("sigma_critic", uniform(BATCH)), given("noise_critic", normal(BATCH, 2, 3))
    loss = critic_loss(options, k_critic, y, s, noise, cond)
    tensors["exp.loss_critic"] = loss
    (tensors["exp.grad_k_critic"],) = torch.autograd.grad(loss, k_critic)
    decay = given("merge_decay", torch.tensor(0.9, dtype=torch.float64))
    tensors["exp.k_critic_merged"] = decay * k_critic + (1 - decay) * k
    tensors |= {"in.k_student": k, "in.k_critic": k_critic, "in.k_teacher": k_teacher}
    return tensors | {"in.guidance_scale": torch.tensor(w, dtype=torch.float64)}, options


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"off_trajectory": "trajectory_point", "off_trajectory_teacher_time": "student", "normalizer_clamp": 0.0},
        {"off_trajectory": "renoised", "off_trajectory_base": "trajectory_prediction", "loss_factor": 0.5},
        {"off_trajectory": "renoised", "off_trajectory_base": "final_sample", "off_trajectory_teacher_time": "student"},
        {"off_trajectory_teacher_base": "final_sample", "critic_x0": "final_sample", "critic_distance": "mse_x0"},
        {"off_trajectory_teacher_base": "trajectory_prediction", "critic_weighting": "snr/(snr+1)"},
        {"guidance_form": "u+w*(c-u)", "guidance_normalizer": "mean_abs_x_minus_x0_teacher"},
        {"guidance_form": "c+w*(c-u)", "normalizer": "mean_abs_x_t_minus_x0_teacher"},
        {"guidance_normalizer": "none", "normalizer": "none", "critic_distance": "mse_epsilon"},
        {"guidance_form": "none", "critic_weighting": "sigma_squared"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "other numbers",
)
def test_a_cdm_loss_of_other_choices_needs_no_code(changes: dict[str, Any], tmp_path: Path):
    compare(tmp_path, walk_cases.CASES, "cdm_losses", *cdm(**changes))


DP = {
    "critic_distance": "mse_velocity",
    "critic_weighting": "uniform",
    "distance": "mse_velocity",
    "guidance_form": "u+w*(c-u)",
    "loss_factor": 0.5,
    "nan_to_num": True,
    "normalizer": "mean_abs_x_t_minus_x0_teacher",
    "normalizer_min": 0.2,
    "rollout_gradient": "all_after_detached_first",
    **TOY,
}


def dpdmd(steps: int, anchors: int, of: int, **changes: Any) -> tuple[Tensors, Options]:
    """DP-DMD from its formula."""
    options, w = DP | changes, 2.0
    k, k_teacher, k_critic = coefficients()
    cond, null = normal(BATCH), torch.zeros(BATCH, dtype=torch.float64)
    start, noise, noise_critic = (normal(BATCH, 2, 3) for _ in range(3))
    grids = [(1 - torch.arange(n + 1, dtype=torch.float64) / n) for n in (steps, of)]
    student_grid, teacher_grid = (2 * q / (1 + q) for q in grids)

    def said(k: Tensor, x: Tensor, s: Tensor, guide: bool) -> Tensor:
        c, u = (raw(k, x, s, which) for which in (cond, null))
        return guided(options["guidance_form"], torch.tensor(w), c, u) if guide else c

    z = start
    for now, then in pairwise(teacher_grid[: anchors + 1]):
        z = z + (then - now) * said(k_teacher, z, now.expand(BATCH), options["guide_teacher"])
    target = ((start - z) / (1 - teacher_grid[anchors])).detach()
    x, kind = start, options["rollout_gradient"]
    for place, (now, then) in enumerate(pairwise(student_grid)):
        if kind == "last_segment" and place == steps - 1:
            x = x.detach()
        v = raw(k, x, now.expand(BATCH), cond)
        x = x + (then - now) * v
        if kind == "all_after_detached_first" and place == 0:
            x = x.detach()
    first = raw(k, start, student_grid[0].expand(BATCH), cond)
    loss_div = (first - target).square().mean()
    s, s_critic = uniform(BATCH), uniform(BATCH)
    if options["normalizer_min"] == 0:
        s, s_critic = s[0], s_critic[0]
    every, every_critic = s.expand(BATCH), s_critic.expand(BATCH)
    x_t = ((1 - column(every)) * x + column(every) * noise).detach()
    teacher = x_t - column(every) * said(k_teacher, x_t, every, options["guide_teacher"])
    critic = x_t - column(every) * said(k_critic, x_t, every, options["guide_critic"])
    plain = x_t - column(every) * said(k_teacher, x_t, every, False)
    away = critic - teacher
    normalizer = size(options["normalizer"], x, x_t, {"teacher": teacher, "teacher_cond": plain})
    if normalizer is not None:
        away = away / normalizer.clamp(min=options["normalizer_min"])
    loss_dm = options["loss_factor"] * (x - (x - away).detach()).square().mean()
    (grad_x,) = torch.autograd.grad(loss_dm, x, retain_graph=True)
    loss = loss_dm + 0.05 * loss_div
    (grad_k,) = torch.autograd.grad(loss, k)
    loss_critic = critic_loss(options, k_critic, x.detach(), every_critic, noise_critic, cond)
    (grad_critic,) = torch.autograd.grad(loss_critic, k_critic)
    tensors = {"in.noise_initial": start, "in.noise": noise, "in.noise_critic": noise_critic, "in.cond": cond}
    tensors |= {"in.sigmas_student": student_grid, "in.sigmas_teacher": teacher_grid}
    tensors |= {"in.num_anchor_steps": torch.tensor(anchors), "in.sigma_dm": s, "in.sigma_critic": s_critic}
    tensors |= {"in.guidance_scale": torch.tensor(w).double(), "in.weight_div": torch.tensor(0.05).double()}
    tensors["in.weight_div"] = torch.tensor(0.05, dtype=torch.float64)
    tensors |= {"in.k_student": k, "in.k_critic": k_critic, "in.k_teacher": k_teacher}
    tensors |= {"exp.anchor": z, "exp.v_target": target, "exp.x0": x, "exp.loss_div": loss_div}
    tensors |= {"exp.loss_dm": loss_dm, "exp.loss_student": loss, "exp.grad_x": grad_x, "exp.grad_k_student": grad_k}
    return tensors | {"exp.loss_critic": loss_critic, "exp.grad_k_critic": grad_critic}, options


@pytest.mark.parametrize(
    ("numbers", "changes"),
    [
        ((4, 5, 30), {}),
        ((2, 6, 6), {"normalizer_min": 0.0}),  # all of the teacher's steps, and one time for the whole batch
        ((3, 1, 8), {"normalizer": "mean_abs_x_minus_x0_teacher", "guidance_form": "c+w*(c-u)"}),
        ((3, 2, 8), {"normalizer": "none", "guide_critic": True, "critic_distance": "mse_x0"}),
        ((3, 2, 8), {"normalizer": "mean_abs_x_minus_x0_teacher_cond", "critic_weighting": "alpha_squared"}),
        ((3, 2, 8), {"rollout_gradient": "all_segments", "guide_teacher": False, "loss_factor": 1.0}),
        ((3, 2, 8), {"rollout_gradient": "last_segment", "guidance_form": "none", "distance": "mse_x0"}),
        ((3, 2, 8), {"nan_to_num": False, "distance": "mse"}),
    ],
)
def test_a_dpdmd_loss_of_other_choices_needs_no_code(numbers: tuple[int, ...], changes: dict, tmp_path: Path):
    compare(tmp_path, walk_cases.CASES, "dpdmd_losses", *dpdmd(*numbers, **changes))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("cdm_losses", {"off_trajectory": "nearby"}),
        ("cdm_losses", {"solver": "heun"}),
        ("dpdmd_losses", {"rollout_gradient": "random"}),
        ("dpdmd_losses", {"normalizer": "max_abs"}),
    ],
)
def test_an_unknown_choice_fails_by_name(case: str, change: dict[str, str], tmp_path: Path):
    ((name, value),) = change.items()
    tensors, options = cdm() if case == "cdm_losses" else dpdmd(2, 2, 4)
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, walk_cases.CASES, case, tensors, options | change)
