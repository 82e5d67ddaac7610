"""Whole runs on one backbone against the same runs on separate networks."""

from pathlib import Path

import pytest
import torch
from toys import adapter_role, make_loop

from fewstep.conditioning.ragged import with_others
from fewstep.data.batch import Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.rollout import Sampler
from fewstep.networks.adapters import Backbone
from fewstep.networks.features import find_tap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.heads import make_head
from fewstep.networks.roles import update_average
from fewstep.recording import Recording
from fewstep.trainers.dmd2 import Dmd2, Dmd2Config
from tests.networks.shared_backbone import ALPHA, NAMES, RANK


class Prompts:
    """A run's conditions: one of two prompts for each sample."""

    def __init__(self, recording: Recording) -> None:
        self.each = with_others(recording.condition(prompts=["a", "b"]), [recording.negative().select([0, 0])])

    def batch(self, seed: int, positions: list[int]):
        return self.each.select([position % 2 for position in positions])


class Noises:
    """A run's real samples."""

    def __init__(self, recording: Recording) -> None:
        self.shape, self.prompts = recording.sample_shape, Prompts(recording)

    def batch(self, seed: int, positions: list[int]) -> Real:
        x0 = Draws(seed, 0, positions).normal("real", self.shape)
        return Real(x0, self.prompts.batch(seed, positions))


def run_dmd2(recording: Recording, out: Path, *, separate: bool, dtype: torch.dtype, checkpointing: bool) -> dict:
    """Three steps of DMD2 with a GAN, an average and two micro-batches. Returns every role's state."""
    options = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    shared = Backbone(recording.network, RANK, ALPHA, **options)
    roles = {}
    for name in (*NAMES, "ema"):
        own = Backbone(recording.network, RANK, ALPHA, **options) if separate else shared
        roles[name] = adapter_role(name, own, recording, trainable=name in ("student", "critic"))
        roles[name].denoiser.autocast = None if dtype == torch.float32 else dtype
    update_average(roles["ema"], roles["student"], 0)
    config = Dmd2Config(
        teacher="tiny",
        out=str(out),
        max_steps=3,
        batch_size=2,
        gradient_accumulation_steps=2,
        critic_updates=2,
        gan_weight=0.1,
        data="noises",
        ema_decay=0.5,
        lr=1e-2,
        report_to="none",
    )
    t, conditioning = torch.full((2,), 0.5, dtype=torch.float64), recording.condition(prompts=["a", "b"])
    x, critic = torch.zeros(2, *recording.sample_shape), roles["critic"].denoiser
    tap = find_tap(critic.network, lambda x: critic.raw(x, t, conditioning), x)
    with torch.no_grad():
        roles["critic"].add("head", make_head(critic.features(x, t, conditioning, tap), seed=0))
    teacher = GuidedDenoiser(roles["teacher"], 2.0)
    sampler = Sampler(recording.schedule, (1.0, 0.5), "fresh", recording.schedule.initial_scale())
    method = Dmd2(config, roles, teacher, sampler, tap)
    conditions, real = Prompts(recording), Noises(recording)
    make_loop(method, config, recording.sample_shape, conditions=conditions, real=real).run()
    return {name: role.state_dict() for name, role in roles.items()}


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [
        pytest.param(torch.float32, False, id="float32"),
        pytest.param(torch.bfloat16, True, id="bf16, checkpointed", marks=pytest.mark.soak),
    ],
)
def test_a_run_on_one_backbone_is_the_run_on_separate_networks(
    recording: Recording, tmp_path: Path, dtype: torch.dtype, checkpointing: bool
):
    """Bit for bit: accumulation, average, GAN, bfloat16 base under autocast, checkpointing."""
    options = {"dtype": dtype, "checkpointing": checkpointing}
    expected = run_dmd2(recording, tmp_path / "separate", separate=True, **options)
    found = run_dmd2(recording, tmp_path / "shared", separate=False, **options)
    assert found["student"].keys() == found["ema"].keys()
    assert not torch.equal(*(next(iter(found[name].values())) for name in ("student", "ema")))
    for name in ("student", "critic", "ema"):
        assert found[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            assert torch.equal(found[name][key], value), f"{name}.{key}"
