"""An adapted layer as one product: PEFT's own answers and gradients, and who is left to PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fewstep.networks import adapted_linear
from fewstep.networks.adapted_linear import AdaptedLinear, product

RANK, WIDE, NARROW = 3, 6, 5


def adapted(dtype: torch.dtype = torch.float64, *, taken_over: bool = True) -> Linear:
    """A layer with an adapter that says something, as PEFT makes it or taken over."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDE, NARROW))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    inject_adapter_in_model(config, network.requires_grad_(False), adapter_name="student")
    layer = network[0].to(dtype)
    nn.init.normal_(layer.lora_B["student"].weight)
    if taken_over:
        AdaptedLinear.take_over(layer)
    return layer


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, WIDE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def answer_and_gradients(layer: Linear, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    answer = layer(x)
    wanted = [x, layer.lora_A["student"].weight, layer.lora_B["student"].weight]
    return [answer, *torch.autograd.grad(answer.sin().sum(), wanted)]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all products that are asked for while the test runs."""
    seen: list[Tensor] = []

    def noted(x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return product(x, *rest)

    monkeypatch.setattr(adapted_linear, "product", noted)
    return seen


def test_it_is_what_peft_computes(products: list[Tensor]) -> None:
    for ours, theirs in zip(
        answer_and_gradients(adapted(), rows()), answer_and_gradients(adapted(taken_over=False), rows()), strict=True
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(products) == 1


def test_its_derivatives_are_those_of_its_values() -> None:
    layer = adapted()
    frozen = layer.base_layer.weight, layer.base_layer.bias
    inputs = [
        part.detach().requires_grad_()
        for part in (rows(), layer.lora_A["student"].weight, layer.lora_B["student"].weight)
    ]

    def of(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return product(x, *frozen, a, b, 0.7)

    assert gradcheck(of, inputs)
    assert gradgradcheck(of, inputs)


def test_without_its_adapter_it_is_the_frozen_layer_to_the_bit(products: list[Tensor]) -> None:
    layer = adapted(torch.float32)
    layer.__dict__["_disable_adapters"] = True
    assert torch.equal(layer(rows(torch.float32)), layer.base_layer(rows(torch.float32)))
    assert products == []


def test_a_frozen_weight_is_not_written() -> None:
    layer = adapted(torch.float32)
    before, version = layer.base_layer.weight.clone(), layer.base_layer.weight._version
    answer_and_gradients(layer, rows(torch.float32))
    assert torch.equal(layer.base_layer.weight, before) and layer.base_layer.weight._version == version


def test_a_forward_derivative_passes_through(products: list[Tensor]) -> None:
    layer, x = adapted(), rows()
    with torch.no_grad():
        _, ours = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
        change = layer(x + 1) - layer(x)  # it is linear
    torch.testing.assert_close(ours, change, rtol=1e-10, atol=1e-12)
    assert len(products) == 2  # neither of them of the dual numbers


@pytest.mark.parametrize("why", ["few rows", "fewer bits", "autocast"])
def test_what_would_lose_by_it_is_left_to_peft(why: str, products: list[Tensor]) -> None:
    dtype = torch.bfloat16 if why == "fewer bits" else torch.float32
    x = rows(dtype)[:1, :2] if why == "few rows" else rows(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        ours, theirs = adapted(dtype)(x), adapted(dtype, taken_over=False)(x)
    assert torch.equal(ours, theirs)
    assert products == []


def test_a_layer_of_another_kind_is_not_taken_over() -> None:
    class Quantized(nn.Linear):
        pass

    layer = adapted(taken_over=False)
    layer.base_layer = Quantized(WIDE, NARROW)
    AdaptedLinear.take_over(layer)
    assert type(layer) is Linear
