"""What samples share is one tensor on a device, so that batches are joined without a look at its values."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.conditioning import shared
from fewstep.conditioning.conditioning import Conditioning, Leaf
from fewstep.conditioning.ragged import with_others
from fewstep.networks.guidance import GuidedDenoiser


class Compared(TorchDispatchMode):
    """Counts comparisons of tensors by value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.equal.default
        return function(*args, **(kwargs or {}))


def conditioning(table: Tensor, batch: int = 1) -> Conditioning:
    return Conditioning({"text": Leaf(torch.zeros(batch, 2), 1), "table": Leaf(table)}, batch)


def test_guidance_joins_two_conditionings_without_comparing_what_they_share() -> None:
    negative, positive = (conditioning(torch.arange(6.0), 3).to("cpu") for _ in range(2))
    guided = GuidedDenoiser(lambda x_t, t, told, end=None: x_t + len(told.tree["table"].value), 2.0)
    with Compared() as compared:
        guided(torch.zeros(3, 2), torch.zeros(3), with_others(positive, [negative]))
        assert compared.count == 0
        assert Conditioning.compatible(conditioning(torch.ones(2)), conditioning(torch.ones(2)))
        assert compared.count == 1  # of what was never moved
    other = conditioning(torch.arange(6.0) + 1).to("cpu")
    assert not Conditioning.compatible(negative, other)


@pytest.mark.parametrize(
    "value",
    [torch.arange(4), torch.tensor(True), torch.rand(2, 3, dtype=torch.complex64), torch.rand(3, 2).T, torch.rand(0)],
    ids=["integers", "no axis", "complex", "transposed", "empty"],
)
def test_equal_content_is_one_tensor_and_other_content_another_one(value: Tensor) -> None:
    one = shared.moved(value, "cpu", torch.float64)
    assert one is shared.moved(value.clone(), "cpu", torch.float64)
    assert torch.equal(one, value.double() if value.is_floating_point() else value)
    assert one is not shared.moved(value[None], "cpu", torch.float64)
    if value.numel():
        assert one is not shared.moved(~value if value.dtype == torch.bool else value + 1, "cpu", torch.float64)


def test_dtypes_are_apart() -> None:
    value = torch.rand(3)
    assert shared.moved(value, "cpu", torch.bfloat16).dtype == torch.bfloat16
    assert shared.moved(value, "cpu", None).dtype == torch.float32


def test_what_was_changed_in_place_is_another_one() -> None:
    first = torch.full((3,), 7.5)
    assert shared.moved(first, "cpu", None) is first
    first += 1
    second = torch.full((3,), 7.5)
    assert shared.moved(second, "cpu", None) is second
    assert shared.moved(torch.full((3,), 8.5), "cpu", None) is not second


def test_nothing_is_kept_alive() -> None:
    source = torch.full((3,), 0.125)
    moved = shared.moved(source, "cpu", torch.float64)
    alive = [weakref.ref(source), weakref.ref(moved)]
    del source, moved
    gc.collect()
    assert [one() for one in alive] == [None, None]
