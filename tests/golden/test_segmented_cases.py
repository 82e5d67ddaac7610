"""Variants of the TCD, PCM and TSCD files, computed here by other means: they pass without new code."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import segmented_cases
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

VP = {"schedule": "vp", "toy_time": "timestep/1000", "num_train_timesteps": 1000}


def compare(folder: Path, case: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "variant.safetensors", metadata)
    golden = GoldenFile(folder / "variant.safetensors")
    segmented_cases.CASES[case](golden)
    golden.finish()


def table(options: dict[str, Any]) -> Tensor:
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return diffusers.DDPMScheduler(**{name: options[name] for name in names}).alphas_cumprod.double()


class Formula:
    """The toy network and DDIM steps, in timesteps of a table, by the formulas of the files."""

    def __init__(self, abar: Tensor, kind: str) -> None:
        self.abar, self.kind = abar, kind

    def both(self, k: Tensor, x: Tensor, step: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and epsilon."""
        t, c = (value.reshape(-1, 1, 1) for value in (step.double() / 1000, cond))
        raw = (k[0] + k[5] * t) * x + k[1] * t + k[2] + k[3] * c + k[4] * x.sin()
        a, s = self.at(step)
        if self.kind == "epsilon":
            return (x - s * raw) / a, raw
        return a * x - s * raw, a * raw + s * x

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[step].reshape(-1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def jump(self, k: Tensor, x: Tensor, step: Tensor, end: Tensor, cond: Tensor) -> Tensor:
        x0, eps = self.both(k, x, step, cond)
        a, s = self.at(end)
        return a * x0 + s * eps


DISTANCES = {
    "mse": lambda d: d.square().flatten(1).mean(1),
    "l1": lambda d: d.abs().flatten(1).mean(1),
    "l2_norm": lambda d: d.flatten(1).norm(dim=1),
    "l2_norm_squared": lambda d: d.flatten(1).square().sum(1),
    "pseudo_huber_norm": lambda d: (d.flatten(1).square().sum(1) + 0.01**2).sqrt() - 0.01,
    "pseudo_huber_elementwise": lambda d: ((d.square() + 0.01**2).sqrt() - 0.01).flatten(1).mean(1),
}


def jumps(case: str, index: list[int], pieces: int, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file of ``pcm_loss`` or ``tscd_loss``, ``changes`` being its options."""
    options = {**VP, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    options |= {"prediction_type": "epsilon", "distance": "mse", "guidance_form": "c+w*(c-u)", "guide_teacher": True}
    options |= {"reduction": "mean", "solver": "ddim", "target_detached": True, "target_network": "student"}
    if not changes.get("distance", "mse").startswith("pseudo"):
        changes.pop("huber_c", None)
    count = changes.pop("count", 50)
    options |= changes
    generator = torch.Generator().manual_seed(0)
    size = len(index)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, noise, cond, uniform = normal(size, 3, 4), normal(size, 3, 4), normal(size), torch.linspace(0.1, 0.9, size)
    uniform = uniform.double()
    k = {name: (0.3 * normal(8)).requires_grad_(name == "student") for name in ("student", "teacher", "target")}
    abar, low, high = table(options), 2.0, 6.0
    formula = Formula(abar, options["prediction_type"])
    spacing = 1000 // count
    rows = torch.tensor(index)
    upper = spacing * (rows + 1) - 1
    lower = (upper - spacing).clamp(min=0)
    files = {"in.x": x, "in.noise": noise, "in.cond": cond, "in.index": rows, "in.uniform_w": uniform}
    files |= {"in.k_student": k["student"], "in.k_teacher": k["teacher"]}
    if case == "pcm_loss":
        every = spacing * torch.arange(1, count + 1) - 1
        before = (every - spacing).clamp(min=0)
        edges = [j * count // pieces for j in range(pieces)]
        ends_of_all = torch.tensor([before[max(e for e in edges if e <= n)] for n in range(count)])
        end = ends_of_all[rows]
        files |= {"in.w_range": torch.tensor([low, high], dtype=torch.float64), "in.num_grid": torch.tensor(count)}
        files |= {"in.num_phases": torch.tensor(pieces), "in.abar_grid": abar[every], "in.abar_grid_prev": abar[before]}
        files |= {"in.abar_target_time": abar[lower], "exp.end_timestep_of_every_index": ends_of_all}
        files |= {"exp.target_is_x_prev": (end == lower).double()}
        options.setdefault("target_at_edge", "x_prev")
    else:
        length = 1000 // pieces
        start = upper // length * length
        draw = torch.arange(size) * 12345 + 17
        end = start + draw % (lower - start)
        files |= {"in.draw": draw, "in.num_segments": torch.tensor(pieces), "in.abar_start": abar[upper]}
        files |= {"in.abar_prev": abar[lower], "in.abar_end": abar[end]}
        options |= {"num_grid": count, "w_min": low, "w_max": high}
    a, s = formula.at(upper)
    x_t = a * x + s * noise
    (c0, ce), (u0, ue) = (formula.both(k["teacher"], x_t, upper, value) for value in (cond, 0 * cond))
    w = (low + uniform * (high - low)).reshape(-1, 1, 1)
    form = options["guidance_form"] if options["guide_teacher"] else "none"
    guided = {
        "none": lambda c, u: c,
        "u+w*(c-u)": lambda c, u: u + w * (c - u),
        "c+w*(c-u)": lambda c, u: c + w * (c - u),
    }[form]
    ra, rs = formula.at(lower)
    x_r = ra * guided(c0, u0) + rs * guided(ce, ue)
    own = k["student"]
    if options["target_network"] == "separate":
        own, files["in.k_target"] = k["target"], k["target"]
    target = formula.jump(own.detach(), x_r, lower, end, cond)
    model = formula.jump(k["student"], x_t, upper, end, cond)
    apart = DISTANCES[options["distance"]](model - target.detach())
    entries = x[0].numel()
    loss = {"mean": apart.mean(), "sum_per_sample": entries * apart, "sum_over_batch_size": entries * apart.mean()}
    loss = loss[options["reduction"]]
    (gradient,) = torch.autograd.grad(loss.mean(), k["student"])
    files |= {"exp.timestep": upper, "exp.timestep_prev": lower, "exp.end_timestep": end, "exp.x_prev": x_r}
    files |= {"exp.model_pred": model, "exp.target": target, "exp.loss": loss, "exp.grad_k_student": gradient}
    return files, options


CHANGES = [
    {"prediction_type": "v_prediction"},
    {"guidance_form": "none"},
    {"guidance_form": "u+w*(c-u)"},
    {"guide_teacher": False},
    {"target_network": "separate", "prediction_type": "v_prediction"},
    {"reduction": "sum_over_batch_size"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"count": 40, "distance": "pseudo_huber_norm", "huber_c": 0.01},
    *({"distance": name, "huber_c": 0.01} for name in DISTANCES),
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize(
    ("case", "index", "pieces"), [("pcm_loss", [0, 7, 20, 21, 39], 2), ("tscd_loss", [7, 18, 33], 4)]
)
def test_another_value_of_each_option_needs_no_new_code(
    tmp_path: Path, case: str, index: list[int], pieces: int, changes: dict
):
    compare(tmp_path, case, *jumps(case, index, pieces, **changes))


def test_an_edge_that_is_computed_as_a_jump_is_the_same(tmp_path: Path):
    compare(tmp_path, "pcm_loss", *jumps("pcm_loss", [0, 25, 30], 2, target_at_edge="jump"))


def test_a_choice_that_is_not_known_fails(tmp_path: Path):
    for changes in ({"target_at_edge": "data"}, {"solver": "dpm"}, {"new_option": 1}, {"distance": "mse", "huber": 1}):
        files, options = jumps("pcm_loss", [3], 2)
        with pytest.raises(AssertionError):
            compare(tmp_path, "pcm_loss", files, options | changes)


@pytest.mark.parametrize(
    ("steps", "eta", "kind", "grid"), [(3, 0.0, "epsilon", 50), (5, 0.6, "v_prediction", 40), (1, 1.0, "epsilon", 20)]
)
def test_other_walks_of_tcd(tmp_path: Path, steps: int, eta: float, kind: str, grid: int):
    options = {**VP, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": kind}
    options |= {"guidance_form": "none", "num_grid": grid}
    abar = table(options)
    formula, generator = Formula(abar, kind), torch.Generator().manual_seed(0)
    spacing, every = 1000 // grid, [(k + 1) * (1000 // grid) - 1 for k in range(grid)][::-1]
    assert spacing * grid == 1000
    timesteps = [every[int(i * grid / steps)] for i in range(steps)]
    k, cond, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((8,), (2,), (2, 3, 4)))
    k, noises = 0.3 * k, torch.randn(max(steps - 1, 1), 2, 3, 4, generator=generator, dtype=torch.float64)
    trajectory, denoised, back = [x], [], []
    for number, step in enumerate(timesteps):
        then = timesteps[number + 1] if number + 1 < steps else 0
        back.append(int(torch.floor((1 - eta) * torch.tensor(then))))
        now, end = torch.full((2,), step), torch.full((2,), back[-1])
        x_s = formula.jump(k, trajectory[-1], now, end, cond)
        denoised.append(x_s)
        if number + 1 < steps and eta > 0:
            ratio = abar[then] / abar[back[-1]]
            x_s = ratio.sqrt() * x_s + (1 - ratio).sqrt() * noises[number]
        trajectory.append(x_s)
    files = {"in.x_init": x, "in.cond": cond, "in.k": k, "in.num_steps": torch.tensor(steps), "in.abar_0": abar[0]}
    files |= {"in.abar_timesteps": abar[timesteps], "in.eta": torch.tensor(eta, dtype=torch.float64)}
    files |= {"in.abar_s": abar[back], "in.noises": noises, "exp.timesteps": torch.tensor(timesteps)}
    files |= {"exp.trajectory": torch.stack(trajectory), "exp.denoised": torch.stack(denoised)}
    compare(tmp_path, "tcd_sampler", files, options)
