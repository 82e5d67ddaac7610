"""Stock pipelines that change samples outside of their network: fewstep's own walk ends where theirs does."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import zoo_image
from pinned_pipelines import (
    a_first_frame,
    a_kept_region,
    a_kept_region_of_latents,
    a_kept_region_under_control,
    a_later_frame,
    frames_for_references,
)

from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.export import plan_student
from fewstep.export.walk.control import as_walked
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.pipeline import with_parts
from fewstep.recording.watch.observe import observe

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("texts_as_they_are")]


def shown(name: str) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """One of the folder's."""
    return zoo_image.load(name), zoo_image.items_of(name), zoo_image.call_of(name)


MADE = {
    "a first frame": (a_first_frame, False, True),
    "a later frame": (a_later_frame, False, False),
    "a kept region": (a_kept_region, True, False),
    "a kept region under control": (a_kept_region_under_control, True, False),
    "a kept region of latents": (a_kept_region_of_latents, True, False),
    "frames for references": (frames_for_references, None, False),
    "Wan22TI2V": (partial(shown, "Wan22TI2V"), None, True),
    "LTXImageToVideo": (partial(shown, "LTXImageToVideo"), None, True),
}


@pytest.mark.parametrize("name", MADE)
def test_own_walks_end_where_stock_ones_do(name: str) -> None:
    make, noised, tail = MADE[name]
    pipeline, items, call = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = record(pipeline, items=items, **call)
    between = recording.between
    assert (between.noised if between is not None else None) == noised
    assert (between is not None and between.tail is not None) == tail
    for steps in (1, 2, 4):
        plan = plan_student(recording, steps, renoise="ode")
        stock = with_parts(pipeline, scheduler=plan.scheduler)
        walked: Recording = as_walked(recording, stock, plan.call, steps)
        denoiser = NetworkDenoiser(recording.network, walked.recipe, recording.schedule, recording.prediction_type)
        sampler = Sampler(recording.schedule, plan.grid, "ode", plan.initial_scale)
        for item in items:
            arguments = {**item, **plan.call, "generator": torch.Generator().manual_seed(5)}
            seen = observe(stock, arguments, stop_at_decode=True, seed=5)
            assert seen.decoder_input is not None
            scale = recording.schedule.input_scale(torch.tensor([plan.grid[0]], dtype=torch.float64))
            noise = (seen.steps[0].network_input.double() / scale / plan.initial_scale).float()
            (told,) = recording.draw_each([item], 5)
            with torch.no_grad():
                end = rollout(denoiser, sampler, noise, told)
            z = recording.codec.to_decoder(end, told)
            assert float((z - seen.decoder_input).abs().max()) <= 1e-5 * float(seen.decoder_input.abs().max().clamp(1))


def test_what_is_redrawn_is_refused_with_what_stops_it() -> None:
    pipeline, items, call = a_first_frame()
    with pytest.raises(RecordingError, match="give image_cond_noise_scale=0 in the call, which stops that"):
        record(pipeline, items=items, **{**call, "image_cond_noise_scale": 0.15})
    with pytest.raises(RecordingError, match="several times for the tokens of one sample"):
        record(pipeline, items=items, **{**call, "strength": 0.5})
