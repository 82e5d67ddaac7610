"""Flash-DMD over vectors of 6 with labels, for the tests of its class."""

from pathlib import Path

import torch
from torch import Tensor
from toys import TinyNetwork, role

from fewstep.critic.image_judge import ImageJudge
from fewstep.data.batch import Real
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule, NoiseSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.heads import LevelHeads
from fewstep.trainers.flash_dmd import FlashDmd, FlashDmdConfig
from fewstep.training.rewards import Reward, Rewards
from tests.toys import Labels

GRID = (1.0, 0.75, 0.5, 0.25)


def config(out: Path, **settings) -> FlashDmdConfig:
    defaults = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "report_to": "none", "lr": 1e-3, "sample_steps": 0}
    if settings.get("gan_weight") != 0:
        defaults["data"] = "numbers"
    return FlashDmdConfig(teacher="tiny", out=str(out), **{**defaults, **settings})


class Numbers:
    """Real samples: vectors around 2, with labels."""

    def batch(self, seed: int, positions: list[int]) -> Real:
        x0 = torch.stack([2 + torch.linspace(-1, 1, 6) * (position % 5) / 5 for position in positions])
        return Real(x0, Labels().batch(seed, positions))


def levels(x0: Tensor) -> list[Tensor]:
    """What the heads see of vectors (B, 6): two levels of tokens, the second one bounded."""
    return [x0.reshape(-1, 2, 3), x0.tanh().reshape(-1, 1, 6)]


def method(
    settings: FlashDmdConfig,
    schedule: NoiseSchedule | None = None,
    kind: str = "flow",
    renoise: str = "fresh",
    reward: Reward | None = None,
) -> FlashDmd:
    """Student and critic start as the teacher."""
    schedule = schedule or FlowSchedule()
    torch.manual_seed(0)
    first, roles = TinyNetwork(6), {}
    for name in (
        "teacher",
        "student",
        "critic",
        *(["ema"] if settings.ema_decay else []),
        *(["target"] if reward else []),
    ):
        network = TinyNetwork(6)
        network.load_state_dict(first.state_dict())
        roles[name] = role(name, network, schedule, kind, trainable=name in ("student", "critic"))
    judge = None
    if settings.gan_weight > 0:
        roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
        heads.add("heads", LevelHeads(levels(torch.zeros(2, 6)), seed=0))
        judge = ImageJudge(heads, levels, settings.gan_loss)
    guided = GuidedDenoiser(roles["teacher"], 1.5)
    grid = GRID if settings.steps == 4 else tuple(1 - k / settings.steps for k in range(settings.steps))
    sampler = Sampler(schedule, grid, renoise, schedule.initial_scale())
    rewards = None
    if reward is not None:
        rewards = Rewards(settings, {"r": reward}, None, "teacher", lambda x0: x0, roles["teacher"], 0)
    return FlashDmd(settings, roles, guided, sampler, judge, 1.0, rewards)
