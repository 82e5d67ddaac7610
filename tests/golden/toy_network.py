"""The toy network of the golden files as a stock-like network that the project's own Denoiser runs."""

from collections.abc import Callable

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
    """How a toy network is called.

    Args:
        time: what makes the network's time of the schedule's timestep: a function, or a number that divides it.
        sign: of the network's answer in fewstep's words.
    """

    component = "network"
    unread = None

    def __init__(self, time: float | Callable[[Tensor], Tensor], sign: int = 1) -> None:
        self.time = time if callable(time) else lambda timestep: timestep / time
        self.sign = sign

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return self.sign * network(x, self.time(timestep), **conditioning.arguments())


def toy_denoiser(
    coefficients: Tensor, schedule: NoiseSchedule, kind: str, time: float | Callable[[Tensor], Tensor], sign: int = 1
) -> NetworkDenoiser:
    """The network of these coefficients (8,); ``time`` and ``sign`` as of :class:`ToyRecipe`."""
    return NetworkDenoiser(ToyNetwork(coefficients), ToyRecipe(time, sign), schedule, kind)


def toy_conditioning(cond: Tensor) -> Conditioning:
    """The condition (B,) of B samples, each with its null condition, which is 0."""
    null = Conditioning({"cond": Leaf(torch.zeros_like(cond), rows=1)}, len(cond))
    return Conditioning({"cond": Leaf(cond, rows=1)}, len(cond), [null])


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
