"""SiD's adversarial terms, on a stock UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from toys import TABLE, role, unconditional

from fewstep.conditioning.conditioning import Conditioning
from fewstep.critic.discriminator import CriticDiscriminator, pooled_logits
from fewstep.data.batch import Batch, Real
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler
from fewstep.eval.bench.floors import declared
from fewstep.networks.features import FeatureTap
from fewstep.trainers.sid import Sid
from tests.trainers.toy_sid import ROLES, config, method_of


class StockCall:
    """How a UNet2DModel is called."""

    def call(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning, *, continuous: bool = False
    ) -> Tensor:
        return network(x, timestep).sample


def tiny_unet(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    return UNet2DModel(block_out_channels=(8, 8), **sizes, **blocks)


def picture_batch(step: int, indices: range) -> Batch:
    size, draws = len(indices), Draws(0, step, indices)
    real = torch.stack([torch.full((1, 8, 8), float(index % 3)) for index in indices])
    return Batch(size, (1, 8, 8), unconditional(size), draws, Real(real, unconditional(size)), False)


def gan_method(out: Path, checkpointing: bool = False, **settings) -> Sid:
    settings = {"adversarial": "sida", "data": "pictures", **settings}
    chosen = config(out, **settings)
    roles = {}
    for seed, name in enumerate(ROLES):
        roles[name] = role(name, tiny_unet(seed), TABLE, "epsilon", trainable=name != "teacher")
        roles[name].denoiser.recipe = StockCall()
        if checkpointing:
            roles[name].denoiser.network.enable_gradient_checkpointing()
    discriminator = None
    if chosen.adversarial != "none":
        discriminator = CriticDiscriminator(chosen, roles["critic"], FeatureTap("mid_block"))
    return method_of(chosen, roles, Sampler(TABLE, (0.626,), "ode", 0.9286), discriminator)


def gradients(method: Sid, step: int, b: Batch) -> dict[str, list[Tensor]]:
    """Of each turn's role; networks of different roles share nothing here."""
    found = {}
    for turn in method.turns(step, b):
        parameters = method.roles[turn.role].parameters()
        found[turn.role] = list(torch.autograd.grad(turn.backward[0][0], parameters))
    return found


def test_the_discriminator_adds_no_parameters(tmp_path: Path):
    with_one, without = gan_method(tmp_path), gan_method(tmp_path, adversarial="none", data=None)
    names = [[name for name, _ in m.roles["critic"].named_parameters()] for m in (with_one, without)]
    assert names[0] == names[1]


def test_logits_are_means_over_the_channels_of_maps_and_over_the_tokens():
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    torch.testing.assert_close(pooled_logits(maps), maps.mean(1).flatten(1))
    torch.testing.assert_close(pooled_logits(tokens), tokens.mean(1))
    assert pooled_logits(torch.randn(2, 3, 6, 4, 5)).shape == (2, 120)


@pytest.mark.parametrize("variant", ["diffusion_gan", "sida"])
def test_the_adversarial_terms_pull_at_both_roles(tmp_path: Path, variant: str):
    strong = {"adversarial": variant, "gan_weight": 10.0, "gan_critic_weight": 10.0}
    ours = gradients(gan_method(tmp_path, **strong), 0, picture_batch(0, range(4)))
    plain = gradients(gan_method(tmp_path, adversarial="none", data=None), 0, picture_batch(0, range(4)))
    for name in ("critic", "student"):
        assert any(not torch.allclose(a, b, rtol=0.1) for a, b in zip(ours[name], plain[name]))


def test_the_students_term_begins_when_told(tmp_path: Path):
    method = gan_method(tmp_path, gan_start_step=3)
    logs = [list(method.turns(step, picture_batch(step, range(2))))[1].log for step in (2, 3)]
    assert ["student/adversarial" in log for log in logs] == [False, True]
    assert [declared(method, step, picture_batch(step, range(2)))["critic/features"].to_inputs for step in (2, 3)] == [
        0,
        1,
    ]


def test_real_and_fake_share_time_and_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    method, seen = gan_method(tmp_path), []
    features = method.roles["critic"].denoiser.features
    monkeypatch.setattr(
        method.roles["critic"].denoiser,
        "features",
        lambda x_t, t, *rest: seen.append((x_t, t)) or features(x_t, t, *rest),
    )
    b = picture_batch(0, range(4))
    next(method.turns(0, b))
    (real, t_real), (fake, t_fake) = seen
    assert torch.equal(t_real, t_fake)
    noise = Draws(0, 0, range(4)).normal("critic_noise", (1, 8, 8))
    expected = add_noise(b.real.x0, noise, TABLE.coefficients(t_real))
    torch.testing.assert_close(real, expected)
    assert not torch.equal(fake, real)


@pytest.mark.parametrize(("variant", "adds_up"), [("none", True), ("diffusion_gan", True), ("sida", False)])
def test_micro_batches_add_up_to_their_batch_but_for_sidas_mean(tmp_path: Path, variant: str, adds_up: bool):
    settings = {"adversarial": variant, "gan_weight": 1.0, "gan_critic_weight": 1.0}
    if variant == "none":
        settings = {"adversarial": "none", "data": None}
    method = gan_method(tmp_path, **settings)
    whole = gradients(method, 0, picture_batch(0, range(4)))
    parts = [gradients(method, 0, picture_batch(0, part)) for part in (range(2), range(2, 4))]
    for name in ("critic", "student"):
        halves = [(a + b) / 2 for a, b in zip(*(part[name] for part in parts))]
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(whole[name], halves))
        assert same == adds_up, name


def test_the_default_weights_are_the_papers_for_means(tmp_path: Path):
    """Their losses are sums over a sample, the student's times 100 (SiD) and times 0.01 or 1 (the adversarial one)."""
    sida, per_sample = (gan_method(tmp_path, adversarial=v).discriminator for v in ("sida", "diffusion_gan"))
    assert (sida.student_weight, sida.critic_weight((1, 8, 8))) == pytest.approx((0.01 / 100, 1 / 64))
    assert sida.critic_weight((1, 8, 4)) == pytest.approx(1 / 32), "each size of samples has its own"
    assert (per_sample.student_weight, per_sample.critic_weight((1, 8, 8))) == pytest.approx((1 / 100, 1.0))


@pytest.mark.parametrize("variant", ["diffusion_gan", "sida"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, variant: str):
    settings = {"adversarial": variant, "gan_weight": 1.0, "gan_critic_weight": 1.0}
    plain, checkpointed = (
        gradients(gan_method(tmp_path, checkpointing, **settings), 0, picture_batch(0, range(2)))
        for checkpointing in (False, True)
    )
    for name in ("critic", "student"):
        for ours, theirs in zip(plain[name], checkpointed[name]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
