"""Recordings of tiny teachers whose networks react to all they are told."""

from collections.abc import Iterator

import pytest
import tiny_pipelines

from fewstep.recording import Recording, record
from fewstep.recording.watch.shake import shaken

FAMILIES = {"unet": tiny_pipelines.tiny_stable_diffusion, "sd3": tiny_pipelines.tiny_flow}


@pytest.fixture(scope="module", params=FAMILIES)
def recording(request: pytest.FixtureRequest) -> Iterator[Recording]:
    recorded = record(FAMILIES[request.param]())
    with shaken(recorded.network):
        yield recorded
