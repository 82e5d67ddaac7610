"""Scorers as rewards: the numbers of the scorers, gradients to the pictures, and files known by their shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import MERGES, TINY, published, random_state, tiny_network

from fewstep.errors import UserError
from fewstep.eval.scorers import rewards
from fewstep.eval.scorers.aesthetic import AestheticHead, AestheticScorer
from fewstep.eval.scorers.clip_score import BACKBONES, clip_scorer
from fewstep.eval.scorers.clip_shapes import VIT_H_14, as_transformers
from fewstep.eval.scorers.clip_tokens import tokenizer_of
from fewstep.eval.scorers.hps import hps_scorer
from fewstep.eval.scorers.pick import pick_scorer
from fewstep.eval.scorers.pixels import clip_pixels, differentiable_pixels, padded_pixels, transformers_pixels
from fewstep.eval.scorers.rewards import AestheticReward, CosineReward, known_by, open_reward_file
from fewstep.eval.weights import MissingWeightsError, Weights

PROMPTS = ["the cat", "a red cat", "nothing red"]


def smooth(height: int, width: int) -> torch.Tensor:
    """Pictures that eight bits do not spoil."""
    noise = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")


@pytest.mark.parametrize("size", [(32, 32), (40, 33), (64, 96), (17, 24)])
@pytest.mark.parametrize(
    ("padded", "theirs"), [(False, clip_pixels), (False, transformers_pixels), (True, padded_pixels)]
)
def test_differentiable_pixels_are_those_of_the_scorers(size: tuple[int, int], padded: bool, theirs):
    pictures = (smooth(*size) * 255).round()
    ours = differentiable_pixels(pictures / 255, 32, padded=padded)
    expected = theirs(pictures.to(torch.uint8), 32)
    assert ours.shape == expected.shape == (3, 3, 32, 32)
    assert (ours - expected).abs().max() < 0.02
    assert (ours - expected).abs().mean() < 0.003  # Pillow rounds to 256 values: 0.001


@pytest.mark.parametrize(
    "scorer",
    [
        lambda state: clip_scorer(tiny_network(state), BACKBONES[1], "", True),
        lambda state: pick_scorer(tiny_network(state, resize=transformers_pixels), "", True),
        lambda state: hps_scorer(tiny_network(state, resize=padded_pixels), "", True),
    ],
    ids=["clip", "pick", "hps"],
)
def test_a_reward_is_the_scorers_number_with_a_gradient(scorer):
    one = scorer(random_state(TINY))
    reward = CosineReward(one.network, one.scale, one.words_before)
    pictures = ((smooth(40, 33) * 255).round() / 255).requires_grad_()
    ours = reward(pictures, PROMPTS)
    theirs = one((pictures.detach() * 255).round().to(torch.uint8), PROMPTS)[one.names[0]]
    assert (ours.double() - theirs).abs().max() < 0.03 * one.scale  # what eight bits are worth here
    (gradient,) = torch.autograd.grad(ours.sum(), pictures)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    # The derivative is that of the number: a small step along it gains what it says.
    step = 1e-4 * gradient / gradient.norm()
    gained = (reward(pictures + step, PROMPTS) - ours).sum()
    assert gained.item() == pytest.approx((gradient * step).sum().item(), rel=0.1)


def test_the_aesthetic_reward_is_the_scorers_number():
    torch.manual_seed(0)
    network, head = tiny_network(random_state(TINY)), AestheticHead(12).eval()
    pictures = (smooth(32, 32) * 255).round() / 255
    theirs = AestheticScorer(network, head, "", True)((pictures * 255).round().to(torch.uint8))["aesthetic"]
    torch.testing.assert_close(AestheticReward(network, head)(pictures).double(), theirs, atol=1e-4, rtol=1e-4)


def test_a_reward_that_reads_prompts_refuses_samples_without():
    network = tiny_network(random_state(TINY))
    with pytest.raises(UserError, match="reads prompts"):
        CosineReward(network, 1.0)(torch.zeros(1, 3, 32, 32), None)


def test_scorers_are_known_by_the_shapes_of_their_tensors():
    open_clip = {name: published(VIT_H_14)[name] for name in ("visual.conv1.weight", "visual.proj")}
    assert known_by(open_clip, Path("x")) == ("hps", None)
    transformers = {rewards._PATCHES: (1280, 3, 14, 14), "visual_projection.weight": (1024, 1280)}
    assert known_by(transformers, Path("x")) == ("pick", None)
    for backbone in BACKBONES:
        shapes = published(backbone.shape)
        assert known_by(shapes, Path("x")) == ("clip", backbone)
        width, embedding = backbone.shape.image.width, backbone.shape.embedding
        theirs = {
            rewards._PATCHES: (width, 3, backbone.shape.patch, backbone.shape.patch),
            "visual_projection.weight": (embedding, width),
        }
        assert known_by(theirs, Path("x")) == ("clip", backbone)
    head = {name: tuple(tensor.shape) for name, tensor in AestheticHead().state_dict().items()}
    assert known_by(head, Path("x")) == ("aesthetic", None)
    with pytest.raises(UserError, match="of no scorer that is known"):
        known_by({"weight": (3, 3)}, Path("x"))


def test_a_file_is_opened_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rewards, "open_tokenizer", lambda _weights: tokenizer_of(MERGES))
    monkeypatch.setattr(rewards, "VIT_H_14", TINY)
    monkeypatch.setattr(rewards, "BACKBONES", (replace(BACKBONES[1], shape=TINY),))
    state = random_state(TINY)
    pictures = smooth(32, 32)
    save_file(
        {name: tensor.contiguous() for name, tensor in as_transformers(state).items()}, tmp_path / "pick.safetensors"
    )
    save_file(state, tmp_path / "hps.safetensors")
    found = {name: open_reward_file(tmp_path / f"{name}.safetensors", Weights()) for name in ("pick", "hps")}
    assert found["pick"].scale == pytest.approx(state["logit_scale"].exp().item())
    assert found["hps"].scale == 100
    for reward in found.values():
        assert not any(p.requires_grad for p in reward.network.model.parameters())
        assert reward(pictures, PROMPTS).shape == (3,)
    monkeypatch.setattr(rewards, "VIT_H_14", VIT_H_14)
    assert open_reward_file(tmp_path / "hps.safetensors", Weights()).scale == BACKBONES[1].scale


def test_the_aesthetic_head_wants_its_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    save_file(AestheticHead().state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(MissingWeightsError, match="ViT-L-14"):
        open_reward_file(tmp_path / "head.safetensors", Weights(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04."])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        open_reward_file(tmp_path / "x.safetensors", Weights())
