"""Feature taps on stock networks: image tokens only, the same numbers with and without the rest of the network."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from fewstep.networks.features import FeatureTap, find_tap


@dataclass
class Stock:
    """A stock network with random weights, a call of it, and what tapping it should find."""

    network: nn.Module
    run: Callable[[Tensor], object]
    x: Tensor
    module: str
    features: Callable[[object], Tensor]
    tokens: int = 16


def shaken(network: nn.Module) -> nn.Module:
    """All weights random, none zero, so that every input matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return network.eval()


def unet() -> Stock:
    network = shaken(
        UNet2DModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    return Stock(
        network, lambda x: network(x, torch.tensor(500)), torch.randn(2, 2, 8, 8), "mid_block", lambda out: out
    )


def text_unet() -> Stock:
    network = shaken(
        UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=6,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
    )
    text = torch.randn(2, 5, 6)
    return Stock(
        network, lambda x: network(x, torch.tensor(500), text), torch.randn(2, 2, 8, 8), "mid_block", lambda out: out
    )


def dit() -> Stock:
    network = shaken(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=2,
            out_channels=2,
            num_layers=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )
    labels, time = torch.tensor([1, 2]), torch.tensor([500, 500])
    return Stock(
        network,
        lambda x: network(x, timestep=time, class_labels=labels),
        torch.randn(2, 2, 8, 8),
        "transformer_blocks.1",
        lambda out: out,
    )


def sd3(text_length: int) -> Stock:
    network = shaken(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=2,
            out_channels=2,
            num_layers=4,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=6,
            caption_projection_dim=8,
            pooled_projection_dim=5,
            pos_embed_max_size=8,
        )
    )
    text, pooled, time = torch.randn(2, text_length, 6), torch.randn(2, 5), torch.tensor([500.0, 500.0])
    return Stock(
        network,
        lambda x: network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time),
        torch.randn(2, 2, 8, 8),
        "transformer_blocks.1",
        lambda out: out[1],  # a joint block returns (text, image)
    )


def flux(double: int, single: int, text_length: int) -> Stock:
    network = shaken(
        FluxTransformer2DModel(
            in_channels=8,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            pooled_projection_dim=5,
            axes_dims_rope=(2, 2, 4),
        )
    )
    text, pooled, time = torch.randn(2, text_length, 6), torch.randn(2, 5), torch.tensor([0.5, 0.5])
    rows = torch.arange(4).repeat_interleave(4)
    image_ids = torch.stack([torch.zeros(16), rows, torch.arange(4).repeat(4)], 1)
    return Stock(
        network,
        lambda x: network(
            x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            img_ids=image_ids,
            txt_ids=torch.zeros(text_length, 3),
        ),
        torch.randn(2, 16, 8),
        "transformer_blocks.1" if double >= single else "single_transformer_blocks.1",
        lambda out: out[1],
    )


def z_image() -> Stock:
    network = shaken(
        ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=6,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
    )
    text, time = [torch.randn(5, 6), torch.randn(5, 6)], torch.tensor([0.5, 0.5])
    # One sequence holds the image's 64 tokens and, behind them, the text's.
    return Stock(
        network,
        lambda x: network(list(x), time, text),
        torch.randn(2, 4, 1, 16, 16),
        "layers.1",
        lambda out: out[:, :64],
        tokens=64,
    )


STOCK = {
    "unet": unet,
    "text_unet": text_unet,
    "dit": dit,
    "sd3": lambda: sd3(text_length=7),
    "sd3_text_as_long_as_image": lambda: sd3(text_length=16),
    "flux_double": lambda: flux(4, 2, text_length=7),
    "flux_double_text_as_long_as_image": lambda: flux(4, 2, text_length=16),
    "flux_single": lambda: flux(2, 4, text_length=7),
    "flux_single_text_as_long_as_image": lambda: flux(2, 4, text_length=16),
    "z_image": z_image,
}


@pytest.fixture(params=STOCK, scope="module")
def stock(request: pytest.FixtureRequest) -> Stock:
    torch.manual_seed(0)
    return STOCK[request.param]()


def tapped(stock: Stock, tap: FeatureTap, x: Tensor) -> Tensor:
    with tap.on(stock.network) as seen:
        stock.run(x)
    return seen.features


def whole_pass(stock: Stock, x: Tensor) -> Tensor:
    """What the tap should see, from a pass through the whole network."""
    outputs = []
    handle = stock.network.get_submodule(stock.module).register_forward_hook(lambda _m, _a, out: outputs.append(out))
    try:
        stock.run(x)
    finally:
        handle.remove()
    return stock.features(outputs[0])


def test_the_tap_is_where_the_image_is(stock: Stock):
    tap = find_tap(stock.network, stock.run, stock.x)
    assert tap.module == stock.module
    features = tapped(stock, tap, stock.x)
    assert torch.equal(features, whole_pass(stock, stock.x))
    if features.dim() == 3:
        assert features.shape[1] == (
            64 if stock.module == "layers.1" else 16
        )  # the image's tokens, and none of the text's


def test_nothing_behind_the_tap_runs(stock: Stock):
    tap = find_tap(stock.network, stock.run, stock.x)
    order = [name for name, _ in stock.network.named_modules()]
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda _m, _a, _o, name=name: ran.append(name))
        for name, module in stock.network.named_modules()
    ]
    try:
        tapped(stock, tap, stock.x)
    finally:
        for handle in handles:
            handle.remove()
    assert stock.module in ran
    behind = {
        "up_blocks.0",
        "conv_out",
        "proj_out",
        "proj_out_1",
        "norm_out",
        "transformer_blocks.2",
        "layers.2",
    } & set(order)
    assert behind
    if stock.module.startswith("single"):
        behind -= {"transformer_blocks.2"}
    assert not behind & set(ran)


def test_features_and_gradients_are_the_same_with_early_exit_and_with_checkpointing(stock: Stock):
    tap = find_tap(stock.network, stock.run, stock.x)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "whole": lambda x: whole_pass(stock, x),
        "early": lambda x: tapped(stock, tap, x),
        "checkpointed": lambda x: tapped(stock, tap, x),
    }
    results = {}
    parameters = list(stock.network.parameters())
    for name, way in ways.items():
        if name == "checkpointed":
            stock.network.enable_gradient_checkpointing()
        x = stock.x.clone().requires_grad_()
        features = way(x)
        # DiT's and Flux's last tokens matter as much as their first: a sum of squares reaches all.
        gradients = torch.autograd.grad(features.square().mean(), [x, *parameters], allow_unused=True)
        results[name] = [features.detach(), *gradients]
    stock.network.disable_gradient_checkpointing()
    assert results["early"][1].abs().max() > 0
    for name in ("early", "checkpointed"):
        for ours, theirs in zip(results[name], results["whole"]):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours, theirs)


def test_the_hook_leaves_the_network_as_it_was(stock: Stock):
    before = stock.run(stock.x)[0]
    tapped(stock, find_tap(stock.network, stock.run, stock.x), stock.x)
    torch.testing.assert_close(stock.run(stock.x)[0], before, rtol=0, atol=0)


def test_a_tap_that_is_never_reached_is_an_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="never called its module '1'"), FeatureTap("1").on(network):
        network[0](torch.zeros(1, 2))


def test_half_precision_features_are_raised_to_float32():
    network = nn.Sequential(nn.Linear(2, 2)).bfloat16()
    with FeatureTap("0").on(network) as seen:
        network(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert seen.features.dtype == torch.float32


def test_a_network_without_blocks_is_refused_by_name():
    network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no mid block"):
        find_tap(network, network, torch.zeros(1, 2))
