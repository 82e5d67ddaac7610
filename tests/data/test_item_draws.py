"""What a pipeline draws for an item, kept several times: which of them a step takes, in memory and from a cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from picture_pipeline import items_of, picture_pipeline
from torch import Tensor

from fewstep.conditioning.item import Item
from fewstep.data.condition_cache import CacheWriter, ConditionCache
from fewstep.data.conditions import Conditions, draws_of
from fewstep.data.encoding import CutPrompts, encode_each
from fewstep.errors import UserError
from fewstep.recording import Recording, record
from fewstep.recording.draw_effect import effect_of_draws

COUNT, DRAWS = 3, 4


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [Item(item) for item in items_of("drawn", COUNT)]


@pytest.fixture(scope="module")
def recording(items: list[Item]) -> Recording:
    return record(picture_pipeline("drawn"), items=items[:2])


@pytest.fixture(scope="module")
def conditions(recording: Recording, items: list[Item]) -> Conditions:
    return Conditions(recording, items=items, draws=DRAWS)


def told(conditioning: Any) -> Tensor:
    value: Tensor = conditioning.arguments()["hidden_states"]
    return value


def test_the_first_draw_is_what_one_draw_is(conditions: Conditions, recording: Recording, items: list[Item]) -> None:
    one = Conditions(recording, items=items)
    assert one.draws == 1 and one.drawn(0, "conditions", range(9)) is None
    rows = list(range(COUNT))
    assert torch.equal(told(conditions.select(rows)), told(one.select(rows)))
    for draw in range(1, DRAWS):
        other = told(conditions.select(rows, [draw] * COUNT))
        assert torch.equal(other, torch.cat([told(one) for one in recording.draw_each(items, draw)]))
        assert not torch.equal(other, told(one.select(rows)))


def test_a_place_of_the_stream_has_one_draw_whoever_asks(conditions: Conditions) -> None:
    whole = told(conditions.batch(5, range(40)))
    parts = [told(conditions.batch(5, range(first, first + 10))) for first in (30, 0, 20, 10)]
    assert torch.equal(torch.cat([parts[1], parts[3], parts[2], parts[0]]), whole)
    assert len({row.sum().item() for row in whole}) == COUNT * DRAWS, "a draw is never taken"
    part = conditions.only([2])
    assert len({row.sum().item() for row in told(part.batch(5, range(40)))}) == DRAWS


def test_a_cache_holds_them_and_says_so(
    conditions: Conditions, recording: Recording, items: list[Item], tmp_path: Path
) -> None:
    def writer(draws: int, resume: bool = False) -> CacheWriter:
        return CacheWriter(tmp_path / "cache", recording, "teacher", items, 2, resume, draws=draws)

    cache = writer(DRAWS)
    for shard in cache.missing:
        each = list(encode_each(recording, cache.of(shard), CutPrompts(), draws=DRAWS))
        cache.enter([cache.write(shard, each)])
    for other in (1, DRAWS - 1):
        with pytest.raises(UserError, match="--resume: --draws differ from those"):
            writer(other, resume=True)
    read = ConditionCache(tmp_path / "cache")
    assert (len(read), read.draws, read.kinds()) == (COUNT, DRAWS, [0])
    stored = Conditions(recording, items=items, cache=read)
    assert torch.equal(told(stored.batch(5, range(24))), told(conditions.batch(5, range(24))))
    with pytest.raises(UserError, match=r"--draws 2: the cache .* holds 4 of each item; make another"):
        Conditions(recording, items=items, cache=read, draws=2)


def test_where_nothing_is_drawn_one_is_kept_and_prompts_are_refused(tmp_path: Path) -> None:
    items = [Item(item) for item in items_of("channels")]
    plain = record(picture_pipeline("channels"), items=items)
    writer = CacheWriter(tmp_path / "cache", plain, "teacher", items, 2, False)
    writer.enter([writer.write(0, list(encode_each(plain, items, CutPrompts())))])
    # As without a cache, it is said and no other cache is asked for.
    for cache in (None, ConditionCache(tmp_path / "cache")):
        stored = Conditions(plain, items=items, cache=cache, draws=DRAWS)
        assert stored.draws == 1
        assert stored.notes[0] == "--draws 4: this teacher draws nothing for its items, so each has one"
    assert draws_of(plain, DRAWS) == 1 and effect_of_draws(plain) is None
    with pytest.raises(UserError, match="--draws 4 is of what a teacher draws for its pictures"):
        draws_of(SimpleNamespace(conditional="prompt"), DRAWS)  # type: ignore[arg-type]


def test_how_far_two_draws_are_apart_is_seen(recording: Recording) -> None:
    apart = effect_of_draws(recording)
    assert apart is not None and 1e-3 < apart < 1
