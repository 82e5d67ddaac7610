"""The toy network of the golden files as a stock-like network that the project's own Denoiser runs."""

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.networks.denoiser import NetworkDenoiser


class ToyNetwork(nn.Module):
    """raw(x, t, r, c) = (k0 + k5 t + k6 r) x + k1 t + k2 + k3 c + k4 sin(x) + k7 r; t, r, c: one number per sample."""

    def __init__(self, coefficients: Tensor) -> None:
        super().__init__()
        self.k = nn.Parameter(coefficients.clone())

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, r: Tensor | None = None) -> Tensor:
        t, cond, r = (_column(v, x) for v in (t, cond, torch.zeros_like(t) if r is None else r))
        k = self.k
        return (k[0] + k[5] * t + k[6] * r) * x + k[1] * t + k[2] + k[3] * cond + k[4] * x.sin() + k[7] * r


class ToyRecipe:
    """How a toy network is called: the schedule's timestep, divided, is its time."""

    component = "network"

    def __init__(self, divisor: float) -> None:
        self.divisor = divisor

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, timestep / self.divisor, **conditioning.arguments())


def toy_denoiser(coefficients: Tensor, schedule: NoiseSchedule, kind: str, time_divisor: float) -> NetworkDenoiser:
    return NetworkDenoiser(ToyNetwork(coefficients), ToyRecipe(time_divisor), schedule, kind)


def toy_conditioning(cond: Tensor) -> Conditioning:
    """The condition (B,) of B samples; 0 is the null condition."""
    return Conditioning({"cond": Leaf(cond, rows=1)}, len(cond))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
