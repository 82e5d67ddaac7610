"""What a run is told of each item is that item's own picture, from the cache to the pairs that it trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.conditioning.item import Item
from fewstep.conditioning.ragged import join, with_others
from fewstep.data.encoding import encode_each
from fewstep.data.items import read_items
from fewstep.data.pairs import pair_noise
from fewstep.diffusion.ode import OdeSolver, teacher_times
from fewstep.programs import cache as programs_cache
from fewstep.programs.distillation import distill
from fewstep.recording import Recording, record
from fewstep.recording.call.items import with_pictures_of
from fewstep.recording.watch.shake import shaken
from tests.guided_teachers import guided_teacher
from tests.item_sets import tiny_editor, write_items

COUNT = 6
CALL = {"guidance_scale": 4.0, "image_guidance_scale": 1.5}
RUN = {"steps": 1, "max_steps": 2, "batch_size": 3, "num_pairs": COUNT, "pair_steps": 2, "seed": 0, "lora_rank": 2}
RUN |= {"cpu": True, "report_to": "none", "sample_steps": 0}


@pytest.fixture(scope="module")
def teacher() -> Iterator[Any]:
    pipeline = tiny_editor()
    with shaken(pipeline.unet):
        yield pipeline


@pytest.mark.parametrize("swapped", [pytest.param((), marks=pytest.mark.soak), (2, 4)])
def test_a_pair_ends_where_the_teacher_leads_with_the_picture_of_its_item(
    teacher: Any, swapped: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were two items' pictures swapped in the cache, here it would be seen of which."""
    items = read_items(write_items(tmp_path / "items", COUNT), type(teacher)).each

    def mixed_up(recording: Recording, asked: Sequence[Item], *more: Any) -> Any:
        places = [swapped[1 - swapped.index(k)] if k in swapped else k for k in range(COUNT)]
        return encode_each(
            recording, [with_pictures_of(one, asked[k]) for one, k in zip(asked, places, strict=True)], *more
        )

    monkeypatch.setattr(programs_cache, "encode_each", mixed_up)
    cached = programs_cache.cache(teacher, tmp_path / "cache", items=tmp_path / "items", call=CALL, cpu=True)
    distill(teacher, "rectified_flow", cache=str(cached), out=str(tmp_path / "run"), call=CALL, **RUN)

    recording = record(teacher, items=items[:2], **CALL)
    guided, schedule = guided_teacher(recording, CALL)[1], recording.schedule
    assert guided.calls == 3
    made = load_file(tmp_path / "run" / "pairs" / "shard_000000.safetensors")
    noise = pair_noise(0, range(COUNT), recording.sample_shape)
    asked = [items[row] for row in made["item"].tolist()]
    pairs = zip(recording.condition_each(items=asked), recording.negative_each(asked), strict=True)
    with torch.no_grad():
        solver = OdeSolver(guided, schedule)
        ends = solver.to_data(
            schedule.initial_scale() * noise, teacher_times(schedule, 2), join([with_others(*pair) for pair in pairs])
        )
    off = ((made["x0"] - ends).flatten(1).norm(dim=1) / ends.flatten(1).norm(dim=1)).tolist()
    wrong = {row for row, error in zip(made["item"].tolist(), off, strict=True) if error > 1e-3}
    assert wrong == set(swapped)
    assert max(error for row, error in zip(made["item"].tolist(), off, strict=True) if row not in swapped) < 1e-5
