"""Maps between the entries of two tensors: found by value, kept as blocks, undone, and written as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.recording.rules.entries import Block, Entries, as_entries, copies, entries_from_json

SHAPE = (4, 5, 8, 6)
Change = Callable[[Tensor], Tensor]


def _packed(x: Tensor) -> Tensor:
    b, c, f, h, w = x.shape
    patches = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    return patches.reshape(b, f * h * w // 4, c * 4)


def _constant(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def _beside(*, before: int = 0, after: int = 0) -> Change:
    sides = _constant(before, *SHAPE[1:]), _constant(after, *SHAPE[1:])
    return lambda x: torch.cat([sides[0], x, sides[1]], 1)


def _first_frame(x: Tensor) -> Tensor:
    mask = torch.ones(1, 1, SHAPE[1], 1, 1)
    mask[:, :, 0] = 0
    return mask * x + (1 - mask) * _constant(*SHAPE)


def _scattered(x: Tensor) -> Tensor:
    mask = torch.ones(SHAPE)
    mask[:, 0] = mask[:, 3] = 0
    return torch.where(mask.bool(), x, _constant(*SHAPE))


MAPS: list[tuple[Change, bool, float]] = [
    # the map, whether it is one block, which share of the source it reads
    (lambda x: x, True, 1),
    (_packed, True, 1),
    (_beside(after=5), True, 1),
    (_beside(before=5), True, 1),
    (_beside(before=1, after=16), True, 1),
    (lambda x: torch.cat([_packed(x), _constant(7, 16)], 1), True, 1),
    (lambda x: torch.cat([_constant(7, 16), _packed(x)], 1), True, 1),
    (lambda x: torch.cat([_constant(4, 1, 8, 6), x], 2).permute(0, 2, 3, 4, 1).flatten(1, 3), True, 1),
    (_first_frame, True, 0.8),
    (lambda x: x[:, :, 1:], True, 0.8),
    (_scattered, False, 0.6),
    (lambda x: torch.cat([x, x], 1), False, 1),
    (lambda x: x.flip(1), False, 1),
]


@pytest.mark.parametrize("number", range(len(MAPS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_is_found_and_holds_for_other_samples(number: int, dtype: torch.dtype) -> None:
    change, is_block, share = MAPS[number]
    seen = [torch.randn(1, *SHAPE) for _ in range(6)]
    targets = [change(x).to(dtype) for x in seen]
    entries = as_entries(copies(targets, seen), SHAPE, targets[0].shape[1:])
    assert (not entries.runs) == is_block
    x = torch.randn(2, *SHAPE).to(dtype).requires_grad_()
    rest = entries.rest(targets[0])
    both = None if rest is None else torch.cat([rest, rest])
    wanted = torch.cat([change(one.float()).to(dtype) for one in x.detach().split(1)])
    got = entries.put(x, both)
    assert torch.equal(got, wanted)
    assert entries.read(SHAPE).float().mean().item() == pytest.approx(share)
    if rest is not None and is_block:
        assert rest.numel() + entries.pick(x[:1]).numel() == targets[0].numel()
    (gradient,) = torch.autograd.grad(got.float().sum(), x)
    assert torch.equal(gradient[0] != 0, entries.read(SHAPE))
    unread = entries.unread(SHAPE)
    assert (unread is None) == (share == 1.0)
    assert unread is None or torch.equal(unread, ~entries.read(SHAPE))
    assert entries_from_json(json.loads(json.dumps(dataclasses.asdict(entries)))) == entries


def test_what_is_no_copy_is_none() -> None:
    seen = [torch.randn(1, 3, 4) for _ in range(4)]
    targets = [torch.cat([x * 2, x, torch.zeros(1, 1, 4)], 1) for x in seen]
    index = copies(targets, seen)
    assert torch.equal(index, torch.cat([-torch.ones(12), torch.arange(12), -torch.ones(4)]).long())


def test_a_block_counted_from_the_end_takes_any_number_of_entries_before_it() -> None:
    entries = as_entries(torch.tensor([-1, -1, 0, 1, 2, 3, 4, 5]), (3, 2), (4, 2))
    assert entries.place == Block(1, 0, 3, from_end=True)
    x = torch.randn(1, 3, 2)
    for count in (0, 1, 4):
        rest = torch.randn(1, count, 2)
        whole = entries.put(x, rest)
        assert torch.equal(whole[:, count:], x) and torch.equal(entries.rest(whole), rest)


def test_a_target_without_room_is_refused() -> None:
    entries = Entries((3, 2), place=Block(1, 2, 3))
    with pytest.raises(ValueError, match="no room for 3 entries"):
        entries.rest(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match=r"its shape is \[5\], not \[4\]"):
        Entries((4,), runs=((0, 0, 2),)).rest(torch.zeros(1, 5))
