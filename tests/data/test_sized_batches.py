"""Batches of items whose samples are of several sizes: one size in each step, and the same whoever takes part."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from picture_pipeline import items_of, picture, picture_pipeline

from fewstep.conditioning.item import Item
from fewstep.data.batch import Batches, SizedBatches
from fewstep.data.conditions import Conditions
from fewstep.data.pair_stream import PairStream, sized_numbers_used
from fewstep.data.pairs import PairMaker, PairSettings, StoredPairs
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.perceptual import images_of
from fewstep.recording import Recording, record
from fewstep.recording.sizes import with_sizes

CPU = torch.device("cpu")
SMALL, LARGE = (3, 4, 4), (3, 6, 4)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Five of 4x4, two of 6x4."""
    made = items_of("channels", 7)
    for number in (2, 5):
        made[number]["image"] = picture(number, 6)
    return [Item(item) for item in made]


@pytest.fixture(scope="module")
def recording(items: list[Item]) -> Recording:
    return with_sizes(record(picture_pipeline("channels"), items=items[:2]), items)


@pytest.fixture(scope="module")
def conditions(recording: Recording, items: list[Item]) -> Conditions:
    return Conditions(recording, items=items)


def sized(conditions: Conditions) -> SizedBatches:
    parts = [(shape, conditions.only(rows)) for shape, rows in conditions.sizes()]
    of = tuple(Batches(part, shape, CPU, asked=part.asked) for shape, part in parts)
    return SizedBatches(of, tuple(len(part) for _, part in parts), seed=3)


def test_an_epoch_has_every_item_equally_often_and_a_step_one_size(conditions: Conditions) -> None:
    assert [(shape, len(rows)) for shape, rows in conditions.sizes()] == [(SMALL, 5), (LARGE, 2)]
    batches, seen = sized(conditions), Counter[str]()
    for step in range(14):
        batch = batches.micro_batch(3, step, range(2), 2, False)
        assert batch.conditioning.arguments()["hidden_states"].shape[2:] == batch.shape[1:]
        seen.update(str(one) for one in batch.asked or ())
    assert len(seen) == 7 and set(seen.values()) == {4}
    # A partition keeps what its items are.
    assert conditions.only([2, 0]).of_one_size().shape(0) == LARGE


def test_what_needs_one_size_refuses_several_in_a_line(recording: Recording) -> None:
    with pytest.raises(UserError, match=r"^--reward looks at images of one size, .* are of 2: give items of one size"):
        images_of(recording, "--reward looks at")
    assert images_of(replace(recording, sizes=()))(torch.zeros(1, *SMALL)).shape[1:] == SMALL


def test_after_a_roll_back_the_sizes_keep_their_turns(conditions: Conditions) -> None:
    batches = sized(conditions)
    shapes = [[batches.micro_batch(seed, step, range(2), 2, False).shape for step in range(7)] for seed in (3, 10_003)]
    assert shapes[0] == shapes[1]


def test_two_processes_and_micro_batches_see_what_one_sees(conditions: Conditions) -> None:
    batches = sized(conditions)
    for step in range(7):
        whole = batches.micro_batch(3, step, range(4), 4, False)
        parts = [batches.micro_batch(3, step, some, 4, False) for some in (range(2), range(2, 4))]
        assert {part.shape for part in parts} == {whole.shape}
        assert [one for part in parts for one in part.asked or ()] == whole.asked
        noise = torch.cat([part.draws.normal("noise", part.shape) for part in parts])
        assert torch.equal(noise, whole.draws.normal("noise", whole.shape))


def test_pairs_of_several_sizes_are_of_the_noise_and_the_item_that_they_are_made_of(
    recording: Recording, conditions: Conditions, tmp_path: Path
) -> None:
    denoiser = NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)
    settings = PairSettings(num=9, steps=1, batch_size=4, shard_size=8, seed=3)
    used = sized_numbers_used(conditions, 9, 3, steps=3, per_step=2)
    about = (recording, {}, denoiser, conditions)
    PairMaker(tmp_path / "all", *about, settings, CPU).run()
    PairMaker(tmp_path / "used", *about, settings, CPU, numbers=used).run()
    whole, few = StoredPairs(tmp_path / "all", {}, conditions), StoredPairs(tmp_path / "used", {}, conditions, used)
    for number in range(9):
        x0, noise, item = whole.row(number)
        assert x0.shape == noise.shape == conditions.shape(item)
        t = torch.ones(1, dtype=torch.float64)
        with torch.no_grad():
            velocity = denoiser.velocity(noise[None], t, conditions.select([item]))[0]
        assert torch.allclose(x0, noise - velocity, atol=1e-5)

    batches = sized(conditions)
    stream = PairStream(few, conditions, CPU)
    own = [stream.only(rows, part.conditions) for (_, rows), part in zip(conditions.sizes(), batches.of, strict=True)]
    for step in range(3):
        number, earlier = batches.turn(step)
        for seed in (3, 10_003):  # that of a roll-back: other pairs than the run has would be asked for
            pairs = own[number].batch(seed, range(2 * earlier, 2 * earlier + 2))
            assert pairs.x0.shape[1:] == batches.of[number].shape
            assert pairs.conditioning.arguments()["hidden_states"].shape[2:] == pairs.x0.shape[2:]
    with pytest.raises(UserError, match=r"of 1 pairs none is for the . items of one of the sizes; make more"):
        sized_numbers_used(conditions, 1, 0, 1, 1)
