"""Variants of the MeanFlow family's cases, computed here by other means: each derivative, guidance and law of times."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mean_flow_cases
import mf_rae_cases
import pytest
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)
BASE = {"prediction_type": "velocity", "schedule": "rf", "toy_time": "t", "target_detached": True, "reduction": "mean"}
DIFFERENCES = ["finite_difference_central", "finite_difference_renoise", "backward_difference"]
H = 0.01


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def wide(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 1)


def raw(k: Tensor, x: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
    t, r, c = wide(t), wide(r), wide(c)
    return (k[0] + k[5] * t + k[6] * r) * x + k[1] * t + k[2] + k[3] * c + k[4] * x.sin() + k[7] * r


def compare(folder: Path, case: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "variant.safetensors", metadata)
    golden = GoldenFile(folder / "variant.safetensors")
    (mean_flow_cases.CASES | mf_rae_cases.CASES)[case](golden)
    golden.finish()


def changed(kind: str, u: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """du/dt, each form in its own words."""
    z = (1 - wide(t)) * x + wide(t) * noise
    if kind == "finite_difference_central":
        return (u(z + H * v, t + H) - u(z - H * v, t - H)) / (2 * H)
    if kind == "backward_difference":
        return (u(z, t) - u(z - H * v, t - H)) / H
    if kind == "finite_difference_renoise":
        more, less = t * (1 + H), t * (1 - H)
        ends = (u((1 - wide(s)) * x + wide(s) * noise, s) for s in (more, less))
        return (next(ends) - next(ends)) / wide(2 * H * t)
    return torch.func.jvp(u, (z, t), (v, torch.ones_like(t)))[1]


def mf_rae(derivative: str, source: str, form: str, w: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Another exponent, constant, scale of the uniform draws, shift, and weight than the files that are shown."""
    x, noise, cond = normal(3, 2, 2), normal(3, 2, 2), normal(3)
    student, teacher = normal(8).requires_grad_(), normal(8)
    uniforms = torch.tensor([[0.9, 0.2], [0.5, 0.5], [0.1, 0.7]], dtype=torch.float64)
    equal, shift, p, c = torch.tensor([0, 1, 0]), 2.0, 0.75, 1e-2
    q = 0.95 * uniforms
    q = shift * q / (1 + (shift - 1) * q)
    t = q.amax(1)
    r = torch.where(equal == 1, t, q.amin(1))
    z, null = (1 - wide(t)) * x + wide(t) * noise, torch.zeros(3, dtype=torch.float64)
    nothing = torch.zeros_like(t)
    own = raw(student, z, t, t, cond).detach(), raw(student, z, t, t, null).detach()
    theirs = raw(teacher, z, t, nothing, cond), raw(teacher, z, t, nothing, null)
    v = {
        "none": theirs[0] if source == "teacher" else noise - x,
        "u+w*(c-u)": theirs[1] + w * (theirs[0] - theirs[1]),
        "c+w*(c-u)": theirs[0] + w * (theirs[0] - theirs[1]),
        "u+w*(v-u)": own[1] + w * (noise - x - own[1]),
        "v+w*(c-u)": noise - x + w * (own[0] - own[1]),
        "v+(1-1/w)*(c-u)": noise - x + (1 - 1 / w) * (own[0] - own[1]),
    }[form]

    def u(z: Tensor, t: Tensor) -> Tensor:
        return raw(student, z, t, r, cond)

    target = (v - wide(t - r) * changed(derivative, u, x, noise, t, v)).detach()
    s = (u(z, t) - target).square().sum((1, 2))
    each = s / (s.detach() + c) ** p
    (gradient,) = torch.autograd.grad(each.mean(), student)
    tensors = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.uniforms": uniforms, "in.r_equals_t": equal}
    tensors |= {"in.k_student": student, "in.k_teacher": teacher, "exp.t": t, "exp.r": r}
    tensors |= {name: torch.tensor(n, dtype=torch.float64) for name, n in {"in.shift": shift, "in.p": p}.items()}
    tensors |= {"exp.loss_per_sample": each, "exp.grad_k_student": gradient, "exp.loss": each.mean()}
    options = {**BASE, "derivative": derivative, "uniform_scale": 0.95, "velocity_source": source, "weight_eps": c}
    options |= {"weighting": "adaptive", "weight_form": "s/(s+c)^p", "guidance_form": form}
    options |= {} if derivative == "exact" else {"derivative_step": H}
    return tensors, options | ({} if form == "none" else {"guidance_scale": w})


@pytest.mark.parametrize("derivative", ["exact", *DIFFERENCES])
@pytest.mark.parametrize("source", ["teacher", "data"])
def test_an_mf_rae_of_another_derivative_needs_no_code(tmp_path: Path, derivative: str, source: str):
    compare(tmp_path, "meanflow_mfrae_loss", *mf_rae(derivative, source, "none"))


@pytest.mark.parametrize(
    ("source", "form"),
    [("teacher", "u+w*(c-u)"), ("teacher", "c+w*(c-u)")]
    + [("data", form) for form in ("u+w*(v-u)", "v+w*(c-u)", "v+(1-1/w)*(c-u)")],
)
def test_a_guided_mf_rae_needs_no_code(tmp_path: Path, source: str, form: str):
    compare(tmp_path, "meanflow_mfrae_loss", *mf_rae("finite_difference_central", source, form, w=2.5))


def test_a_difference_beyond_the_noisiest_time_is_still_mf_raes(tmp_path: Path):
    """Its code asks beyond t = 1; the trainer takes a one-sided difference there."""
    tensors, options = mf_rae("finite_difference_central", "data", "none")
    assert float(tensors["exp.t"].max()) + H < 1
    tensors["in.shift"], options["uniform_scale"] = torch.tensor(30.0, dtype=torch.float64), 1.0
    q = tensors["in.uniforms"]
    q = 30 * q / (1 + 29 * q)
    t, r = q.amax(1), torch.where(tensors["in.r_equals_t"] == 1, q.amax(1), q.amin(1))
    assert float(t.max()) + H > 1
    x, noise, cond, k = (tensors[f"in.{name}"] for name in ("x", "noise", "cond", "k_student"))
    z = (1 - wide(t)) * x + wide(t) * noise

    def u(z: Tensor, t: Tensor) -> Tensor:
        return raw(k, z, t, r, cond)

    target = noise - x - wide(t - r) * changed("finite_difference_central", u, x, noise, t, noise - x)
    s = (u(z, t) - target.detach()).square().sum((1, 2))
    each = s / (s.detach() + options["weight_eps"]) ** 0.75
    (gradient,) = torch.autograd.grad(each.mean(), k)
    tensors |= {"exp.t": t, "exp.r": r, "exp.loss_per_sample": each, "exp.loss": each.mean()}
    compare(tmp_path, "meanflow_mfrae_loss", tensors | {"exp.grad_k_student": gradient}, options)


def trajectory_pairs(solver: str, labels: str, kind: str, w: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """On a shifted grid of three steps, whose states the even labels do not meet."""
    noise, cond, student, teacher = normal(2, 2, 2), normal(2), normal(8).requires_grad_(), 0.3 * normal(8)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64)
    index = torch.tensor([0, 3, 5, 6, 11, 8])
    nothing = torch.zeros(2, dtype=torch.float64)

    def v(z: Tensor, s: Tensor) -> Tensor:
        s = s.expand(2)
        null = raw(teacher, z, s, nothing, nothing)
        return null + w * (raw(teacher, z, s, nothing, cond) - null)

    states = [noise]
    for now, then in pairwise(sigmas):
        z, slope = states[-1], v(states[-1], now)
        if solver == "heun" and then > 0:
            slope = (slope + v(z + (then - now) * slope, then)) / 2
        states.append(z + (then - now) * slope)
    y, place = states[::-1], sigmas.flip(0)
    tau = place if labels == "solver_times" else torch.arange(4, dtype=torch.float64) / 3
    rows = [(i, j, b) for i in range(1, 4) for j in range(i) for b in range(2)]
    chosen = [rows[k] for k in index]
    x_t = torch.stack([y[i][b] for i, _, b in chosen])
    target = torch.stack([(y[i][b] - y[j][b]) / (tau[i] - tau[j]) for i, j, b in chosen])
    t, r, c = (torch.stack(each) for each in zip(*((tau[i], tau[j], cond[b]) for i, j, b in chosen), strict=True))
    error = raw(student, x_t, t, r, c) - target.detach()
    each = {"mse": error.square().mean((1, 2)), "l1": error.abs().mean((1, 2))}[kind]
    (gradient,) = torch.autograd.grad(each.mean(), student)
    tensors = {"in.noise": noise, "in.cond": cond, "in.sigmas": sigmas, "in.index": index, "in.k_student": student}
    tensors |= {"in.k_teacher": teacher, "exp.loss_per_sample": each, "exp.loss": each.mean()}
    options = {**BASE, "distance": kind, "label_times": labels, "solver": solver, "velocity_source": "teacher"}
    options |= {"pair_order": "i_outer_j_inner_sample_last", "guidance_form": "none"}
    options |= {} if w == 1 else {"guidance_form": "u+w*(c-u)", "guidance_scale": w}
    return tensors | {"exp.grad_k_student": gradient}, options


@pytest.mark.parametrize("labels", ["solver_times", "uniform_grid"])
@pytest.mark.parametrize(("solver", "kind", "w"), [("euler", "mse", 1.0), ("heun", "l1", 2.5)])
def test_trajectory_pairs_of_other_labels_and_solvers_need_no_code(
    tmp_path: Path, labels: str, solver: str, kind: str, w: float
):
    compare(tmp_path, "mfrae_cmt_loss", *trajectory_pairs(solver, labels, kind, w))


@pytest.mark.parametrize("change", [{"label_times": "none"}, {"pair_order": "by_chance"}, {"solver": "rk4"}])
def test_an_unknown_choice_of_trajectory_pairs_fails_by_name(tmp_path: Path, change: dict[str, str]):
    (name, value), *_ = change.items()
    tensors, options = trajectory_pairs("euler", "solver_times", "mse", 1.0)
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, "mfrae_cmt_loss", tensors, options | change)


def port_a(derivative: str, sampler: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    x, noise, draws, equal = normal(3, 2, 2), normal(3, 2, 2), 0.4 * normal(3, 2), torch.tensor([0, 0, 1])
    student = normal(8).requires_grad_()
    q = draws.sigmoid() if sampler == "logit_normal" else (draws := torch.sigmoid(draws))
    t = q.amax(1)
    r = torch.where(equal == 1, t, q.amin(1))
    z, v, cond = (1 - wide(t)) * x + wide(t) * noise, noise - x, torch.zeros(3, dtype=torch.float64)

    def u(z: Tensor, t: Tensor) -> Tensor:
        return raw(student, z, t, r, cond)

    target = (v - wide(t - r) * changed(derivative, u, x, noise, t, v)).detach()
    s = (u(z, t) - target).square().sum((1, 2))
    (gradient,) = torch.autograd.grad(s.mean(), student)
    drawn = "normals" if sampler == "logit_normal" else "uniforms"
    tensors = {"in.x": x, "in.noise": noise, f"in.{drawn}": draws, "in.r_equals_t": equal, "in.k_student": student}
    tensors |= {"exp.t": t, "exp.r": r, "exp.loss_per_sample": s, "exp.loss_mean": s.mean()}
    tensors |= {"exp.mse": (u(z, t) - target).square().mean(), "exp.grad_k_student": gradient}
    options = {**BASE, "derivative": derivative, "weighting": "uniform", "guidance_form": "none"}
    options |= {"time_sampler": sampler, "derivative_step": H}
    return tensors, options | ({"p_mean": 0.0, "p_std": 1.0} if sampler == "logit_normal" else {})


@pytest.mark.parametrize("derivative", DIFFERENCES)
@pytest.mark.parametrize("sampler", ["logit_normal", "uniform"])
def test_a_port_a_of_another_derivative_and_law_of_times_needs_no_code(tmp_path: Path, derivative: str, sampler: str):
    compare(tmp_path, "meanflow_port_a", *port_a(derivative, sampler))


@pytest.mark.parametrize("derivative", DIFFERENCES)
def test_a_port_b_of_another_derivative_needs_no_code(tmp_path: Path, derivative: str):
    tensors, options = port_a(derivative, "logit_normal")
    tensors |= {"in.normal_t": tensors["in.normals"][:, 0], "in.normal_r": tensors["in.normals"][:, 1]}
    tensors |= {"in.uniform": 0.25 + (tensors.pop("in.r_equals_t") == 0).double() / 2}
    tensors |= {f"in.P_{name}": torch.tensor([0.0, 1.0], dtype=torch.float64) for name in "tr"}
    tensors["exp.loss"] = tensors.pop("exp.loss_mean")
    kept = {name: tensor for name, tensor in tensors.items() if name not in ("exp.loss_per_sample", "exp.mse")}
    options |= {"r_equals_t_fraction": 0.5, "time_sampler": "v0"}
    compare(tmp_path, "meanflow_port_b", kept, {k: v for k, v in options.items() if not k.startswith("p_")})


def fastgen(derivative: str, loss_type: str, power: float = 0.5) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """From the teacher under c + w (c - u), with a row near the noisiest time and one whose times are one."""
    x, noise, cond = normal(4, 2, 2), normal(4, 2, 2), normal(4)
    student, teacher = normal(8).requires_grad_(), normal(8)
    t = torch.tensor([0.995, 0.5, 0.7, 0.3], dtype=torch.float64)
    r = torch.tensor([0.2, 0.5, 0.1, 0.295], dtype=torch.float64)
    z, null, w, c = (1 - wide(t)) * x + wide(t) * noise, torch.zeros_like(t), 1.5, 1e-2
    positive, negative = (raw(teacher, z, t, null, of) for of in (cond, null))
    v = positive + w * (positive - negative)

    def u(z: Tensor, t: Tensor) -> Tensor:
        return raw(student, z, t, r, cond)

    along = noise - x if derivative == "finite_difference_renoise" else v
    step = H * t if derivative == "finite_difference_renoise" else torch.full_like(t, H)
    up, down = t + step, t - step
    up, down = torch.where(up <= 0.999, up, t), torch.where((down > r) & (down >= 0), down, t)
    if derivative == "backward_difference":
        up = torch.where(down < t, t, up)
    ends = [u(z + wide(s - t) * along, s) for s in (up, down)]
    jvp = ((ends[0] - ends[1]) / wide(up - down)).detach()
    target = (v - wide((t - r).clamp(0, 0.999)) * jvp).detach()
    answer = u(z, t)
    norm = (target - answer).flatten(1).norm(dim=1).detach()
    if loss_type == "opt_grad":
        weight = (norm + c) ** -power
        each = (answer - (answer + wide(weight) * (target - answer)).detach()).square().sum((1, 2))
    else:
        weight = (norm**2 + c) ** -power
        each = (answer - target).square().sum((1, 2)) * weight
    (gradient,) = torch.autograd.grad(each.mean(), student)
    tensors = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.t": t, "in.r": r, "in.iteration": torch.tensor(0)}
    tensors |= {"in.k_student": student, "in.k_teacher": teacher, "in.norm_const": torch.tensor(c).double()}
    tensors |= {"exp.velocity": v, "exp.jvp": jvp, "exp.loss_per_sample": each, "exp.loss_mean": each.mean()}
    tensors |= {"exp.weight": weight, "exp.grad_k_student": gradient}
    options = {**BASE, "derivative": derivative, "derivative_step": H, "adaptive_p": power, "gap_max": 0.999}
    options |= {"guidance_form": "c+w*(c-u)", "guidance_scale": w, "guidance_t_min": 0.0, "guidance_t_max": 1.0}
    options |= {"loss_type": loss_type, "tangent_warmup": 0, "velocity_source": "teacher", "weighting": "adaptive"}
    return tensors, options | {"weight_form": "(norm+c)^-p" if loss_type == "opt_grad" else "s/(s+c)^p"}


@pytest.mark.parametrize("derivative", DIFFERENCES)
@pytest.mark.parametrize("loss_type", ["l2", "opt_grad"])
def test_a_fastgen_of_another_derivative_needs_no_code(tmp_path: Path, derivative: str, loss_type: str):
    compare(tmp_path, "meanflow_fastgen_loss", *fastgen(derivative, loss_type))


@pytest.mark.parametrize("loss_type", ["l2", "opt_grad"])
def test_a_fastgen_without_weights_needs_no_code(tmp_path: Path, loss_type: str):
    """Where the power is 0, the weight is one; such a file has a form of the weight, or none."""
    tensors, options = fastgen("finite_difference_central", loss_type, power=0.0)
    compare(tmp_path, "meanflow_fastgen_loss", tensors, options)
    compare(tmp_path, "meanflow_fastgen_loss", tensors, options | {"weighting": "uniform"})


@pytest.mark.parametrize("change", [{"derivative": "guess"}, {"guidance_form": "c-u"}, {"velocity_source": "air"}])
def test_an_unknown_choice_fails_by_name(tmp_path: Path, change: dict[str, str]):
    tensors, options = mf_rae("exact", "data", "none")
    (name, value), *_ = change.items()
    with pytest.raises(AssertionError, match=f"unknown {name} = '{value}'"):
        compare(tmp_path, "meanflow_mfrae_loss", tensors, options | change)
