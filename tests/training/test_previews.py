"""The numbers of a run's sample grids, where samples are of several sizes or there is a single one."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.training.previews import Previews


def numbers(shapes: Sequence[tuple[int, ...]], scale: float = 2.0) -> dict[str, float]:
    """Of a teacher's samples of these shapes, each by itself, and a student's that are ``scale`` as large."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, *shape, generator=generator) for shape in shapes]

    def x0(who: float, _sampler: Any, _step: int, some: Sequence[int], _pause: Any) -> Tensor:
        return who * torch.cat([drawn[index] for index in some])

    samples: Any = SimpleNamespace(
        why_no_pictures=lambda: "of a test",
        teacher_sampler=None,
        batches=lambda count: [[index] for index in range(len(shapes))],
        x0=x0,
    )
    return Previews(samples).save(None, 1.0, scale, None)  # type: ignore[arg-type]


def test_they_are_of_the_size_that_most_samples_have() -> None:
    small, large = (3, 4, 4), (3, 6, 4)
    found = numbers([small, *[large] * 5, small])
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, *shape, generator=generator) for shape in [small, *[large] * 5]]
    assert found["samples/teacher_std"] == pytest.approx(torch.cat(drawn[1:]).double().std().item())
    assert found["samples/student_std"] == pytest.approx(2 * found["samples/teacher_std"])


def test_of_a_single_sample_of_each_size_there_are_none() -> None:
    assert numbers([(3, 4, side) for side in range(4, 12)]) == {}
    assert numbers([(3, 4, 4)]) == {}
