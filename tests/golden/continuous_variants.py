"""Toy networks as TrigFlow's F, written down from their formulas, for variants of the continuous-time cases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import continuous_cases
import torch
from golden_file import GoldenFile
from safetensors.torch import save_file
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def compare(folder: Path, case: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> None:
    metadata = {"case": case, "options": json.dumps(options), "tolerance": "relative 1e-7 of the largest entry"}
    tensors = {name: torch.as_tensor(tensor).detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "variant.safetensors", metadata)
    golden = GoldenFile(folder / "variant.safetensors")
    continuous_cases.CASES[case](golden)
    golden.finish()


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def col(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 1)


def raw(k: Tensor, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return (k[0] + k[5] * col(t)) * x + k[1] * col(t) + k[2] + k[3] * col(c) + k[4] * x.sin()


def edm(k: Tensor, sd: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """F of an EDM network at TrigFlow's sample and angle."""

    def output(y: Tensor, angle: Tensor, c: Tensor) -> Tensor:
        sigma = sd * angle.tan()
        x, both = y / col(angle.cos()), (sigma**2 + sd**2).sqrt()
        x0 = col(sd**2 / both**2) * x + col(sigma * sd / both) * raw(k, x / col(both), sigma.log() / 4, c)
        return (col(angle.cos()) * y - x0) / (sd * col(angle.sin()))

    return output


def flow(k: Tensor, sd: float, epsilon: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same of one of rectified flow."""

    def output(y: Tensor, angle: Tensor, c: Tensor) -> Tensor:
        t = sd * angle.sin() / (angle.cos() + sd * angle.sin())
        x = y * col(((1 - t) ** 2 + (t / sd) ** 2).sqrt())
        said = raw(k, x, t, c)
        x0 = (x - col(t) * said) / col(1 - t) if epsilon else x - col(t) * said
        return (col(angle.cos()) * y - x0) / (sd * col(angle.sin()))

    return output


def slope(f: Callable[[Tensor, Tensor], Tensor], y: Tensor, angle: Tensor, ways: tuple[Tensor, Tensor]) -> Tensor:
    return torch.func.jvp(f, (y, angle), ways)[1]
