"""A network of one attention to one token, in which what guidance adds can be said exactly by an adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from toys import PlainRecipe

from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.data.batch import Batch, Pairs, Real
from fewstep.diffusion.draws import Draws, keyed_order
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.roles import NetworkRole, Role
from fewstep.networks.speed_up import PluggedRole, SpeedUpDenoiser
from fewstep.pipelines.speed_up import SpeedUp
from fewstep.trainers.speed_up_net import SpeedUpNet, SpeedUpNetConfig

D = 4
GRID = (1.0, 0.5)
FLOW = FlowSchedule()


class OneToken(nn.Module):
    """x0 or whatever it says: a number for the time times x, plus an orthogonal map of the token."""

    def __init__(self, text: float = 1.0) -> None:
        super().__init__()
        self.text = text
        self.attention = Attention(D, cross_attention_dim=D, heads=1, dim_head=D, bias=False, out_bias=False)
        with torch.no_grad():
            self.attention.to_v.weight.copy_(torch.eye(D).roll(1, 0))
            self.attention.to_out[0].weight.copy_(torch.eye(D).flip(0))

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        seen = self.attention(x[:, None].to(torch.float32), encoder_hidden_states=encoder_hidden_states)
        return x * torch.cos(timestep.to(x)[:, None] / 700) + self.text * seen[:, 0]


class Gaussian(OneToken):
    """The exact velocity of N(m, S^2) under flow matching, where m is what the attention makes of the token."""

    S = 0.05

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        t = timestep.to(x)[:, None] / 1000
        mean = self.attention(x[:, None].to(torch.float32), encoder_hidden_states=encoder_hidden_states)[:, 0]
        variance = (1 - t) ** 2 * self.S**2 + t**2
        return (t - (1 - t) * self.S**2) / variance * (x - (1 - t) * mean) - mean

    def guided_mean(self, positive: Conditioning, kappa: float) -> Tensor:
        """m (B, D) of the guided Gaussians of prompts, away from prompt 3."""
        both = (tokens([3] * positive.batch_size), positive)
        x = torch.zeros(positive.batch_size, 1, D)
        with torch.no_grad():
            less, more = (self.attention(x, **told.arguments())[:, 0] for told in both)
        return less + kappa * (more - less)


def tokens(numbers: Sequence[int]) -> Conditioning:
    """One token of length 1 for each prompt, and for its negative the fourth."""
    told, other = (
        {"encoder_hidden_states": Leaf(torch.eye(D)[n][:, None], 1)} for n in (list(numbers), [3] * len(numbers))
    )
    return Conditioning(told, len(numbers), [Conditioning(other, len(numbers))])


class Prompts:
    """Conditions of a run, in its keyed order."""

    def batch(self, seed: int, positions: Sequence[int]) -> Conditioning:
        return tokens([keyed_order(seed, "prompts", 3, place) for place in positions])


class Samples:
    """Real samples of a run, each with its prompt."""

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        told = tokens([place % 3 for place in positions])
        x0 = torch.stack([torch.randn(D, generator=torch.Generator().manual_seed(place)) for place in positions])
        return Real(x0, told)


def batch(step: int = 0, indices: range = range(6)) -> Batch:
    real = Samples().batch(0, list(indices))
    pairs = Pairs(real.x0, real.x0, real.conditioning)
    told = Prompts().batch(0, list(indices))
    return Batch(len(indices), (D,), told, Draws(0, step, indices), real, False, pairs)


def adapter_of(network: OneToken, rank: int = 0, scale: float = 1.0) -> SpeedUp:
    """As a run begins; ``scale`` is gamma."""
    made = SpeedUp("network", {"attention": D}, D, [1, D], rank=rank)
    with torch.no_grad():
        made.usual_tokens.copy_(torch.eye(D)[3][None, None])
        for less, more in zip(made.negative, made.positive, strict=True):
            less.scale.fill_(scale)
            if not rank:
                less.to_k.up.weight.copy_(network.attention.to_k.weight)
                less.to_v.up.weight.copy_(network.attention.to_v.weight)
            more.load_state_dict(less.state_dict())
    return made.eval()


def method(
    settings: SpeedUpNetConfig,
    schedule: NoiseSchedule = FLOW,
    kind: str = "flow",
    network: OneToken | None = None,
    guidance_scale: float = 3.0,
    grid: tuple[float, ...] = GRID,
    *,
    pictured: bool = False,
) -> SpeedUpNet:
    torch.manual_seed(0)
    network = (network or OneToken()).eval().requires_grad_(False)
    base = NetworkDenoiser(network, PlainRecipe(), schedule, kind)
    adapter = adapter_of(network, settings.lora_rank)
    student = PluggedRole("student", SpeedUpDenoiser(base, adapter), network, adapter)
    roles: dict[str, Role] = {"teacher": NetworkRole("teacher", base), "student": student}
    guided = GuidedDenoiser(roles["teacher"], guidance_scale)
    sampler = Sampler(schedule, grid, "ode", schedule.initial_scale())
    return SpeedUpNet(settings, roles, guided, sampler, pictured=pictured)
