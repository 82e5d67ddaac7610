"""The items of a planned run: what they take encoded, and those whose training steps take most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.data.cache_form import read_index
from fewstep.data.conditions import draws_of, nothing_drawn
from fewstep.data.encoded_size import examples_of
from fewstep.data.encoding import tensors_of
from fewstep.data.items import Items
from fewstep.data.targets import TARGETS, wanted_results
from fewstep.recording import Recording


@dataclass(frozen=True)
class PlannedItems:
    """What a run's items take.

    Attributes:
        each: bytes of one, encoded, in all of its draws, beside what items share.
        words: what all of them take; "" where they are made up.
        notes: what a user may want to know of them, a line each.
        largest: the teacher's recording at the size of samples, and what they are told: of those samples of which no
            other one has more numbers and is told more.
    """

    each: int
    words: str
    notes: list[str]
    largest: list[tuple[Recording, Conditioning]]


def planned_items(config: RunConfig, recording: Recording, items: Items | None) -> PlannedItems | None:
    """Encode some of the items of a run; None of prompts, labels or nothing.

    Args:
        config: of the run.
        recording: of the teacher, with all sizes of the items' samples.
        items: of the run; None where the recording has made-up ones.

    Raises:
        UserError: the run would refuse them.
    """
    if config.data == TARGETS:
        wanted_results(items)
    kept = draws_of(recording, config.draws)
    if recording.conditional != "item":
        return None
    if config.cache is not None and (index := read_index(Path(config.cache))) is not None:
        kept = index.get("draws", 1)
    own = recording.invocation
    examples = examples_of(recording, [own.item, own.other] if items is None else items.each)
    shapes = [recording.for_item(one).sample_shape for one in examples.each]
    cases = [(recording.at(shape), told) for shape, told in zip(shapes, examples.told, strict=True)]
    notes = [note] if (note := nothing_drawn(config.draws, kept)) else []
    if recording.sizes:
        notes.append(f"samples of {1 + len(recording.sizes)} sizes, each step of one: what a step takes is the most")
    return PlannedItems(
        round(kept * examples.mean), "" if items is None else examples.describe(kept), notes, _undominated(cases)
    )


def _undominated(cases: list[tuple[Recording, Conditioning]]) -> list[tuple[Recording, Conditioning]]:
    """Those of which no other has a larger sample and is told more, the largest first."""
    sizes = [(math.prod(one.sample_shape), _numbers(told)) for one, told in cases]
    largest: list[tuple[Recording, Conditioning]] = []
    most = -1
    for place in sorted(range(len(cases)), key=lambda place: sizes[place], reverse=True):
        if sizes[place][1] > most:
            most = sizes[place][1]
            largest.append(cases[place])
    return largest


def _numbers(told: Conditioning) -> int:
    """In all that the network is told for one answer."""
    return sum(tensor.numel() for tensor in tensors_of(Conditioning(told.tree, told.batch_size)))
