"""The teacher of every method's case, and a folder with images to train on; a file may have others of these names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def teacher() -> Iterator[Any]:
    # Not at the top: the process that hands out the tests imports no diffusers.
    from fewstep.recording.watch.shake import shaken
    from tests.tiny_pipelines import tiny_dit

    pipeline = tiny_dit()
    with shaken(pipeline.transformer):
        yield pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.end_to_end.method_cases import images

    folder = tmp_path_factory.mktemp("cases")
    images(folder / "images")
    return folder
