"""Bytes of live tensors: closed forms, the same on real tensors and on fake ones."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fewstep.programs.planning.memory import Footprint, tensor_bytes
from fewstep.programs.planning.weightless import fake_tensors, fake_world


@pytest.mark.parametrize("fake", [False, True])
def test_a_chain_of_layers_keeps_what_its_backward_pass_needs(fake: bool) -> None:
    """Linear and tanh of width 32 on 8 rows: tanh keeps its output, which is the next layer's input. float32."""
    depth, width, rows = 5, 32, 8
    with fake_world(fake_tensors()) if fake else nullcontext():
        network = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())])
        x = torch.zeros(rows, width)
        with Footprint(known=[x, *network.parameters()]) as footprint:
            y = network(x)
            assert footprint.alive == 4 * depth * rows * width
            loss = y.sum()
            del y
            kept = footprint.alive
            loss.backward()
            del loss
            gradients = 4 * depth * (width * width + width)
            assert footprint.alive == gradients
            assert footprint.peak >= max(kept, gradients)
            footprint.restart()
            assert footprint.peak == gradients
            network.zero_grad(set_to_none=True)
            assert footprint.alive == 0
            with torch.no_grad():
                answer = network(x)
            assert footprint.alive == answer.nbytes == 4 * rows * width


def test_views_and_known_tensors_are_not_new() -> None:
    x = torch.zeros(10, 10)
    with Footprint(known=[x]) as footprint:
        views = [x.t(), x[2:], x.view(-1)]
        assert footprint.alive == 0
        copies = [x.clone(), x.expand(3, 10, 10)]
        assert footprint.alive == 400
    assert len(views) + len(copies) == 5


def test_shared_weights_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert tensor_bytes(first, second) == 128
    second.weight = nn.Parameter(first.weight.detach())
    assert tensor_bytes(first, second) == 64
    assert tensor_bytes(first, [first.weight[:1], torch.zeros(2)]) == 72
