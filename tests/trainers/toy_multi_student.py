"""Eight modes in the plane, two for each of four labels, and students that are too small for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mixture import MixtureTeacher
from torch import Tensor, nn
from toys import Labels, labels, make_loop, role

from fewstep.data.batch import Real
from fewstep.diffusion.draws import Draws, keyed_order
from fewstep.diffusion.rollout import Sampler, draw_sample
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.dmd2 import Dmd2
from fewstep.trainers.multi_student import MultiStudent, MultiStudentConfig
from fewstep.training.loop import sampling_role

ANGLES = torch.arange(8) * torch.pi / 4
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
STD = 0.3
#: Of label k: those opposite each other are two labels', so that no label is a half-plane.
OF_LABEL = torch.tensor([[0, 3], [1, 4], [2, 7], [5, 6]])


class LabelledTeacher(MixtureTeacher):
    """The exact x0 of a label's two Gaussians under flow matching, plus a correction that starts at zero."""

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        t = (timestep / 1000).to(x.dtype).reshape(-1, 1)
        alpha, variance = 1 - t, (1 - t) ** 2 * STD**2 + t**2
        means = MODES[OF_LABEL[label.long()]]
        offset = x[:, None] - alpha[:, None] * means
        share = torch.softmax(-offset.square().sum(2) / (2 * variance), 1)
        each = means + STD**2 * (alpha / variance)[:, None] * offset
        return (share[:, :, None] * each).sum(1) + self.correction(torch.cat([x, t], 1))


class SmallNetwork(nn.Module):
    """x0 of sample, time and label, by one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        told = torch.stack([timestep / 1000, label / 2 - 0.75], 1).to(x.dtype)
        return self.outer(torch.tanh(self.inner(torch.cat([x, told], 1))))


class RealModes:
    """Real samples of some labels, in the run's keyed order."""

    def __init__(self, of: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.labels = torch.tensor([*of]).repeat_interleave(400)
        which = OF_LABEL[self.labels, torch.randint(2, (len(self.labels),), generator=generator)]
        self.x0 = MODES[which] + STD * torch.randn(len(which), 2, generator=generator)

    def batch(self, seed: int, positions: Sequence[int]) -> Real:
        rows = [keyed_order(seed, "real", len(self.x0), position) for position in positions]
        return Real(self.x0[rows], labels(self.labels[rows]))


def config(out: Path, **settings: Any) -> MultiStudentConfig:
    small = {"student_network": {"width": 6}, "data": "real"}
    defaults = {"steps": 1, "report_to": "none", "sample_steps": 0, "batch_size": 64, "log_steps": 100, "seed": 0}
    return MultiStudentConfig(teacher="modes", out=str(out), **{**defaults, **small, **settings})


def method(settings: MultiStudentConfig, width: int = 6) -> MultiStudent:
    """A student of so many hidden units, with a critic that starts as the teacher."""
    schedule = FlowSchedule()
    torch.manual_seed(0)
    networks = {"teacher": LabelledTeacher(), "critic": LabelledTeacher(), "student": SmallNetwork(width)}
    networks |= {"ema": SmallNetwork(width)} if settings.ema_decay else {}
    roles = {
        name: role(name, network, schedule, "sample", trainable=name in ("student", "critic"))
        for name, network in networks.items()
    }
    if "ema" in roles:
        roles["ema"].copy_weights(roles["student"])
    own = Dmd2(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), Sampler(schedule, (1.0,), "ode"))
    return MultiStudent(settings, own)


def trained(settings: MultiStudentConfig, of: Sequence[int], width: int = 6) -> Tensor:
    """Samples (400 len(of), 2) of a student that was trained for some labels, 400 of each."""
    one = method(settings, width)
    make_loop(one, settings, (2,), conditions=Labels([*map(float, of)]), real=RealModes(of)).run()
    return sampled(one, of)


@torch.no_grad()
def sampled(one: MultiStudent, of: Sequence[int]) -> Tensor:
    asked = torch.tensor([*of]).repeat_interleave(400)
    draws = Draws(5, 0, range(len(asked)))
    return draw_sample(sampling_role(one.roles), one.sampler, draws, (2,), labels(asked))


def shares(samples: Tensor, of: Sequence[int]) -> Tensor:
    """The share of its label's samples within 2 deviations of each mode, (8,); a teacher's is 0.43."""
    asked = torch.tensor([*of]).repeat_interleave(400)
    found = torch.zeros(8)
    for label in of:
        distances = torch.cdist(samples[asked == label], MODES[OF_LABEL[label]])
        found[OF_LABEL[label]] = (distances < 2 * STD).float().mean(0)
    return found
