"""What networks without weights answer."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.programs.planning.drawn import draw


def answer(layers: int, given: Tensor) -> list[Tensor]:
    return draw([given], [torch.empty(len(given), 5, 8, device="meta") for _ in range(layers)])


def test_rows_follow_their_own_input_and_are_the_same_in_any_batch() -> None:
    given = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    (three,), (one,) = answer(1, given), answer(1, given[1:2])
    assert torch.equal(three[1:2], one) and not torch.equal(three[0], three[2])


def test_the_hidden_states_of_all_layers_differ_and_share_their_memory() -> None:
    states = answer(24, torch.ones(1, 3))
    assert len({tuple(state.flatten().tolist()) for state in states}) == 24
    assert len({state.untyped_storage()._cdata for state in states}) == 1
    assert all(state.is_contiguous() for state in states)
