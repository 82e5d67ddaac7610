"""Files of known cases that nobody's code computed: written by a test, in the words of the golden README."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Options = dict[str, Any]


def column(values: Tensor) -> Tensor:
    """Values (B,) of samples (B, C, H)."""
    return values.reshape(-1, 1, 1)


def raw(k: Tensor, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The toy network of one time; ``x``: (B, C, H); ``t``, ``c``: (B,)."""
    t, c = column(t), column(c)
    return (k[0] + k[5] * t) * x + k[1] * t + k[2] + k[3] * c + k[4] * x.sin()


def compare(
    folder: Path, cases: dict[str, Callable[[GoldenFile], None]], case: str, tensors: Tensors, options: Options
):
    """Write the file, and compare it as :mod:`test_golden` compares those that are given."""
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-9 of the largest entry"}
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "variant.safetensors", metadata)
    golden = GoldenFile(folder / "variant.safetensors")
    cases[case](golden)
    golden.finish()


def weight(name: str, sigma: Tensor, alpha: Tensor, data: float, t: Tensor, r: Tensor | None = None) -> Tensor:
    """A factor of the vocabulary's ``weighting`` (B,)."""
    level = sigma / alpha
    c_out = level * data / (level**2 + data**2).sqrt()
    factors = {
        "uniform": lambda: torch.ones_like(t),
        "karras": lambda: level**-2 + data**-2,
        "sigma_squared": lambda: sigma**2,
        "alpha_squared": lambda: alpha**2,
        "1/(t-r)": lambda: 1 / (t - r),
        "1/sqrt(t-r)": lambda: (t - r) ** -0.5,
        "1/c_out": lambda: 1 / c_out,
        "1/c_out^2": lambda: 1 / c_out**2,
        "1/sigma": lambda: 1 / sigma,
        "1/sigma^2": lambda: 1 / sigma**2,
        "1/sin(t)^2": lambda: (alpha**2 + sigma**2) / sigma**2,
        "snr/(snr+1)": lambda: 1 / (1 + level**2),
        "1/(2.3*max(1-t,0.1))": lambda: 1 / (2.3 * (1 - t).clamp(min=0.1)),
    }
    return factors[name]()


def distances(error: Tensor, c: float) -> Tensors:
    """Every ``distance`` of the vocabulary but barron: (B, ...) -> (B,)."""
    error = error.flatten(1)
    return {
        "mse": error.square().mean(1),
        "l1": error.abs().mean(1),
        "l2_norm": error.norm(dim=1),
        "l2_norm_squared": error.square().sum(1),
        "pseudo_huber_norm": (error.square().sum(1) + c**2).sqrt() - c,
        "pseudo_huber_elementwise": ((error.square() + c**2).sqrt() - c).mean(1),
    }


def guided(form: str, w: Tensor, c: Tensor, u: Tensor) -> Tensor:
    """A ``guidance_form`` of the vocabulary; w broadcasts."""
    return {"none": c, "u+w*(c-u)": u + w * (c - u), "c+w*(c-u)": c + w * (c - u)}[form]
