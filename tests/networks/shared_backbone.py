"""Teacher, student and critic on one backbone, or each on a network of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from toys import adapter_role

from fewstep.diffusion.draws import Draws
from fewstep.networks.adapters import AdapterRole, Backbone
from fewstep.networks.features import FeatureTap, find_tap
from fewstep.networks.heads import make_head
from fewstep.recording import Recording

RANK, ALPHA = 3, 5
NAMES = ("teacher", "student", "critic")


@dataclass
class Players:
    roles: dict[str, AdapterRole]
    head: nn.Module
    tap: FeatureTap
    x_t: Tensor
    t: Tensor
    conditioning: object


def players(recording: Recording, *, separate: bool, dtype=torch.float64, **options) -> Players:
    """Teacher, student and critic on one backbone, or each on a network of its own."""
    shared = Backbone(recording.network, RANK, ALPHA, dtype=dtype, **options)
    roles = {}
    for name in NAMES:
        own = Backbone(recording.network, RANK, ALPHA, dtype=dtype, **options) if separate else shared
        roles[name] = adapter_role(name, own, recording)
    x_t = Draws(0, 0, range(2)).normal("x", recording.sample_shape).to(dtype)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    conditioning = recording.condition(prompts=["a", "b"])
    critic = roles["critic"].denoiser
    tap = find_tap(critic.network, lambda x: critic.raw(x, t, conditioning), x_t)
    with torch.no_grad():
        head = make_head(critic.features(x_t, t, conditioning, tap), seed=0).to(dtype)
    return Players(roles, head, tap, x_t, t, conditioning)
