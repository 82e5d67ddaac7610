"""Where a sample stands in an argument."""

from __future__ import annotations

import pytest
import torch

from fewstep.recording.errors import RecordingError
from fewstep.recording.rules.item_fit import fit_sample_entries
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
