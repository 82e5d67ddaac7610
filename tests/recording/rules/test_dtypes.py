"""The dtype of a network's weights: that of most of them, followed through casts, and counted once."""

import copy

import pytest
import torch
from torch import nn

from fewstep.recording.rules.dtypes import network_dtype


def network() -> nn.Sequential:
    """Most numbers in the first layer; the norm stays in float32, as in networks that keep a few so."""
    return nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8), nn.Linear(8, 2).bfloat16())


def test_it_is_the_dtype_of_most_numbers() -> None:
    assert network_dtype(network()) == torch.bfloat16
    assert network_dtype(nn.Linear(2, 2)) == torch.float32
    assert network_dtype(nn.ReLU()) == torch.float32
    few = network()
    few[1] = nn.Linear(8, 64)
    assert network_dtype(few) == torch.float32


def test_an_adapter_has_no_say() -> None:
    adapted = network()
    adapted[0].lora_A = nn.Linear(64, 64)
    assert network_dtype(adapted) == torch.bfloat16


def test_a_cast_network_is_counted_anew() -> None:
    """In place, as a copy, and with other weights in the same modules."""
    cast = network()
    assert network_dtype(cast) == torch.bfloat16
    assert network_dtype(copy.deepcopy(cast).float()) == torch.float32
    assert network_dtype(cast.to(torch.float16)) == torch.float16
    for layer in (cast[0], cast[2]):
        layer.weight = nn.Parameter(layer.weight.detach().double())
    assert network_dtype(cast) == torch.float64
    cast[0] = nn.Linear(8, 8)
    assert network_dtype(cast) == torch.float32


def test_a_network_that_is_asked_again_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a network asks; its weights may be thousands."""
    asked = network()
    assert network_dtype(asked) == torch.bfloat16
    monkeypatch.delattr(nn.Module, "named_modules")
    assert network_dtype(asked) == torch.bfloat16
