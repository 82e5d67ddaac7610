"""Where a walk starts: noise times a number, reordered or a part of it, or with a trace of a picture; nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.export.walk.start import Start, start_of
from fewstep.export.walk.trace import Draw, Trace, TracedStep

SHAPE = (1, 3, 5, 4, 4)


def drawn() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def start(
    x: Tensor,
    *,
    scale: float = 1.0,
    pictured: bool = True,
    level: tuple[float, float] = (0.0, 1.0),
    before: tuple[Tensor, ...] = (),
) -> Start | None:
    step: Any = TracedStep(
        called=frozenset(),
        timestep=999.0,
        passed={},
        sample=x,
        scaled=False,
        network_input=x,
        answer=x,
        told=x,
        draws=[],
        result=x,
    )
    seen = Trace(steps=[step], initial_draws=[Draw(value, True) for value in (*before, drawn())])
    return start_of(seen, SimpleNamespace(init_noise_sigma=scale), x.double(), 1e-5, pictured, level=level)


def test_noise_times_a_number_also_reordered() -> None:
    assert start(drawn()) == Start(1.0)
    assert start(14.6 * drawn().movedim(2, -1), scale=14.6) == Start(14.6)


def test_a_part_of_the_noise_where_a_picture_takes_the_place_of_the_rest() -> None:
    assert start(drawn()[:, :, 1:]) == Start(1.0)
    assert start(2 * drawn()[:, :, 1:]) is None, "the scheduler multiplies with 1"
    other = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert start(other) is None


def test_a_trace_of_a_picture_is_seen_where_there_may_be_one() -> None:
    picture = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    traced = 0.999 * drawn() + 0.001 * picture
    found = start(traced)
    assert found is not None and found.traced and found.scale == pytest.approx(0.999, abs=1e-3)
    assert start(traced, pictured=False) is None
    assert start(0.9 * drawn() + 0.1 * picture) is None
    # Hunyuan's other form steps all frames but the first, of noise that was drawn for all of them.
    later = start(traced[:, :, 1:])
    assert later is not None and later.traced and later.scale == pytest.approx(0.999, abs=1e-3)
    assert start(traced[:, :, 1:], pictured=False) is None
    assert start((0.9 * drawn() + 0.1 * picture)[:, :, 1:]) is None and start(traced[:, :, 1:].flip(2)) is None


def test_what_a_table_leaves_of_a_picture_at_its_last_entry() -> None:
    """Depth2Img at strength 1: the picture under the noise of the first time."""
    picture, level = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), (0.0683, 0.9977)
    begun = level[0] * picture + level[1] * drawn()
    assert start(begun, level=level) == Start(level[1], traced=True)
    assert start(begun, level=level, pictured=False) is None and start(begun) is None
    other = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert start(level[0] * picture + level[1] * other, level=level) is None


def test_what_was_drawn_before_is_no_noise_of_the_first_sample() -> None:
    """An encoder's draw, as large as a sample; so low in a table that any noise is near a clean sample."""
    encoded, level = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), (0.66, 0.75)
    assert start(drawn(), level=level, before=(encoded,)) == Start(1.0)
    assert start(0.75 * drawn(), scale=0.75, level=level, before=(encoded,)) == Start(0.75)


def test_a_picture_under_little_noise_is_no_trace() -> None:
    """Depth2Img from timestep 399: training starts from noise alone, and its pipeline from the picture."""
    picture, level = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), (0.66, 0.75)
    assert start(level[0] * picture + level[1] * drawn(), level=level) is None
