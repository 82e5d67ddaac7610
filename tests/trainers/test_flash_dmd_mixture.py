"""Flash-DMD's own class distils a teacher whose score has a closed form: where the student ends is known."""

from pathlib import Path

import pytest
import torch
from mixture import MixtureTeacher, distance_of_walk, mixture_sample
from torch import Tensor
from toys import Labels, make_loop, role, unconditional

from fewstep.critic.image_judge import ImageJudge
from fewstep.data.batch import Real
from fewstep.diffusion.draws import keyed_generator
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.schedule import FlowSchedule
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.head_role import HeadRole
from fewstep.networks.heads import LevelHeads
from fewstep.trainers.flash_dmd import FlashDmd, FlashDmdConfig


class Points:
    """Real samples of the mixture."""

    def __init__(self) -> None:
        self.points = mixture_sample(4096, 3)

    def batch(self, seed: int, positions: list[int]) -> Real:
        return Real(self.points[torch.tensor(positions) % 4096], unconditional(len(positions)))


def drawn_features(x0: Tensor) -> list[Tensor]:
    """A frozen random layer, one token for each point: what stands for pixels seen by a network."""
    generator = keyed_generator("features of a mixture")
    weight, bias = torch.randn(2, 64, generator=generator), torch.randn(64, generator=generator)
    return [torch.relu(x0 @ weight + bias)[:, None]]


@pytest.mark.parametrize(
    ("steps", "bound"),
    [
        pytest.param(280, 0.3, id="short"),
        pytest.param(1200, 0.15, id="long", marks=pytest.mark.soak),
    ],
)
def test_a_student_of_a_mixture_comes_to_draw_from_it(tmp_path: Path, steps: int, bound: float):
    schedule, roles = FlowSchedule(), {}
    torch.manual_seed(0)
    for name in ("teacher", "student", "critic"):
        roles[name] = role(name, MixtureTeacher(), schedule, "sample", trainable=name != "teacher")
    roles["discriminator"] = heads = HeadRole("discriminator", roles["teacher"])
    heads.add("heads", LevelHeads(drawn_features(torch.zeros(2, 2)), seed=0))
    sampler = Sampler(schedule, (1.0, 0.75), "fresh")
    settings = FlashDmdConfig(
        teacher="mixture",
        data="points",
        out=str(tmp_path),
        report_to="none",
        sample_steps=0,
        steps=2,
        max_steps=steps,
        batch_size=64,
        lr=2e-3,
        critic_lr=5e-3,
        critic_updates=1,
        gan_weight=1.0,
        discriminator_lr=2e-3,
        log_steps=steps,
        checkpointing_steps=steps,
    )
    judge = ImageJudge(heads, drawn_features, settings.gan_loss)
    method = FlashDmd(settings, roles, GuidedDenoiser(roles["teacher"], 1.0, further=0), sampler, judge)
    before = distance_of_walk(method.student, sampler)
    make_loop(method, settings, (2,), conditions=Labels(None), real=Points()).run()
    after = distance_of_walk(method.student, sampler)
    assert before > 0.5
    assert after < bound
