"""Where a sample stands in an argument."""

from __future__ import annotations

import pytest
import torch

from fewstep.recording.errors import RecordingError
from fewstep.recording.rules.item_fit import fit_output_entries, fit_sample_entries
from fewstep.recording.watch.observation import NetworkCall, Step


def test_a_sample_whose_frames_are_rows_is_refused_in_words() -> None:
    """AnimateDiff tells its control network each frame as a sample."""
    videos = [torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(3)]

    def steps(told: list[torch.Tensor]) -> list[Step]:
        pairs = zip(videos, told, strict=True)
        return [Step([NetworkCall("net", {"x": own})], x, 500.0, True, x, None) for x, own in pairs]

    rows = steps([x.transpose(1, 2).flatten(0, 1) for x in videos])
    with pytest.raises(RecordingError, match=r"x holds a sample in 3 rows \(each frame"):
        fit_sample_entries("x", rows)
    rule = fit_sample_entries("x", steps([x.transpose(1, 2) for x in videos]))
    assert rule is not None and rule.shape == (3, 4, 2, 2)


def test_a_scheduler_that_steps_frames_as_rows_is_refused_in_words() -> None:
    """I2VGen-XL's network is asked for a clip, its scheduler for each frame."""
    clips = [torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    rows = [clip.transpose(1, 2).flatten(0, 1) for clip in clips]
    steps = [
        Step([NetworkCall("net", {"x": clip}, clip)], frames, 500.0, True, frames, clip)
        for clip, frames in zip(clips, rows, strict=True)
    ]
    with pytest.raises(RecordingError, match=r"net answers for 1 is handed to the scheduler in 3 rows \(each frame"):
        fit_output_entries("net", steps)
    whole = [Step(step.calls, clip, 500.0, True, clip, clip) for step, clip in zip(steps, clips, strict=True)]
    assert fit_output_entries("net", whole).relation == "same"
