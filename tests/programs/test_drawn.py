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


def test_a_sample_that_has_several_rows_of_an_input_follows_all_of_its_own_and_no_other() -> None:
    """A first and a last picture; what all samples share, as positions of tokens, has two dimensions."""
    pictures = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    like = [torch.empty(count, 5, 8, device="meta") for count in (2, 1)]
    (both,), (alone,) = draw([pictures], like[:1]), draw([pictures[2:]], like[1:])
    assert torch.equal(both[1:], alone) and not torch.equal(both[0], both[1])
    (other,) = draw([torch.cat([pictures[:3], pictures[:1]])], like[:1])
    assert torch.equal(other[0], both[0]) and not torch.equal(other[1], both[1])
    positions = pictures[:, 0]
    (both,), (alone,) = draw([positions], like[:1]), draw([positions], like[1:])
    assert torch.equal(both[:1], both[1:]) and torch.equal(both[:1], alone)


def test_the_hidden_states_of_all_layers_differ_and_share_their_memory() -> None:
    states = answer(24, torch.ones(1, 3))
    assert len({tuple(state.flatten().tolist()) for state in states}) == 24
    assert len({state.untyped_storage()._cdata for state in states}) == 1
    assert all(state.is_contiguous() for state in states)
