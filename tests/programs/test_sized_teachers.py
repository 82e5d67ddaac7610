"""Teachers whose items have samples of several sizes, as a run opens them."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.programs.teacher import TeacherSettings, open_teacher
from fewstep.recording import recording as module
from tests.recording.picture_pipeline import items_of, picture, picture_pipeline


def test_the_codec_of_each_size_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, read = module.read_codec, list[tuple[int, ...]]()

    def noted(recording: Any) -> Any:
        read.append(recording.sample_shape)
        return own(recording)

    monkeypatch.setattr(module, "read_codec", noted)
    items = items_of("channels", 4)
    for number in (2, 3):
        items[number]["image"] = picture(number, 6)
    recording = open_teacher(TeacherSettings(teacher="t", items=items), "cpu", picture_pipeline("channels")).recording
    proofs = [one.proof for one in (recording, *recording.sizes) if isinstance(one, module.Recording)]
    assert len(proofs) == 2 and None not in proofs
    for one in (recording, *recording.sizes):
        assert recording.at(one.sample_shape).codec.describe()
    assert len(read) == len(set(read)) == 2
