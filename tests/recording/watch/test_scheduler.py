"""What is taken for a pipeline's sample, and for its network's answer, of what passes between it and its scheduler."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fewstep.recording.watch.scheduler import sample_scaled, without_variance

X = torch.arange(2.0 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def test_a_scaled_sample_is_told_from_what_else_is_scaled() -> None:
    number, beside = torch.tensor(3.0), torch.cat([X, X], 1)
    assert sample_scaled([], X) is None and sample_scaled([number, beside], X) is None
    half = X / 2
    assert sample_scaled([X, half, beside, number, None], X) is half
    guided = torch.cat([X, X])
    assert sample_scaled([guided], X) is guided
    # A video's frames are the rows of what the scheduler steps.
    video = X.transpose(0, 1)[None]
    assert sample_scaled([video], X) is video and sample_scaled([video[:, :2]], X) is None


def test_an_answer_is_without_the_variance_that_its_scheduler_takes_out() -> None:
    answer, learned = torch.cat([X, X + 1], 1), DDPMScheduler(variance_type="learned_range")
    assert torch.equal(without_variance(learned, answer, X), X)
    assert without_variance(DDPMScheduler(), answer, X) is answer
    assert without_variance(DDIMScheduler(), answer, X) is answer
    assert without_variance(learned, X, X) is X
