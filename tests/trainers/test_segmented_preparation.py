"""What a run of segmented consistency is prepared with: the counts that its segments allow, and its rates."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from fewstep.diffusion.timesteps import even_grid
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.trainers.segmented_consistency import SegmentedConsistency
from tests.trainers.toy_segmented import config, vector_method


@pytest.mark.parametrize(("variant", "segments", "counts"), [("tcd", [1], (1, 2, 3, 4)), ("tscd", [4, 2], (2, 4))])
def test_students_are_for_the_counts_that_their_last_segments_divide(
    tmp_path: Path, variant: str, segments: list[int], counts: tuple[int, ...]
):
    settings = config(tmp_path, variant, segments=segments, adversarial_weight=[0.0])
    toy, said = vector_method(settings), {}
    grids = {count: tuple(even_grid(count).tolist()) for count in range(1, 5)}
    bench = SimpleNamespace(
        make_roles=lambda *_names: toy.roles,
        guided=lambda role: GuidedDenoiser(role, 1.0),
        describe=lambda **what: said.update(what),
        sampler=toy.sampler,
        shift=1.0,
        grids=grids,
    )
    SegmentedConsistency.prepare(settings, bench)
    assert said == {"trained_at_every_count": True, "counts": counts, "grids": {n: grids[n] for n in counts}}


def test_the_discriminator_has_a_rate_of_its_own(tmp_path: Path):
    method = vector_method(config(tmp_path, "pcm", adversarial_weight=[0.1], adversarial_lr=5e-2, lr=1e-3))
    assert [method.learning_rate(role) for role in ("student", "discriminator")] == [1e-3, 5e-2]
