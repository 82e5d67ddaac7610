"""GAN heads: one logit per sample from the features of the paper's networks, and the same weights for a seed."""

import pytest
import torch

from fewstep.networks.heads import ConvHead, TokenHead, make_head


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((768, 8, 8), ConvHead),  # EDM on ImageNet-64
        ((1280, 8, 8), ConvHead),  # Stable Diffusion 1.5
        ((48, 32, 32), ConvHead),  # SDXL's side; its 1280 channels below
        ((16, 3, 8, 8), ConvHead),  # a video: channels, frames, height, width
        ((8, 1, 1), ConvHead),
        ((8, 6, 10), ConvHead),
        ((16, 64), TokenHead),
    ],
)
def test_every_feature_shape_gives_one_logit_per_sample(shape: tuple[int, ...], kind: type):
    features = torch.randn(2, *shape, requires_grad=True)
    head = make_head(features, seed=0)
    assert isinstance(head, kind)
    logits = head(features)
    assert logits.shape == (2,)
    gradient = torch.autograd.grad(logits[0], features)[0]
    assert gradient[0].abs().max() > 0
    assert not gradient[1].any()  # samples do not see each other


def test_sdxls_head_halves_the_side_three_times():
    with torch.device("meta"):
        head = ConvHead(1280, 32)
        assert head(torch.randn(2, 1280, 32, 32)).shape == (2,)
        assert head.body(torch.randn(2, 1280, 32, 32)).shape == (2, 1280, 4, 4)


def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_left_alone():
    features = torch.randn(1, 8, 8, 8)
    state = torch.get_rng_state()
    one = make_head(features, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    two, other = make_head(features, 3), make_head(features, 4)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_features_that_are_neither_maps_nor_tokens_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        make_head(torch.zeros(2, 3), 0)
