"""What a pipeline pins of its samples between steps: seen, walked by fewstep's own walkers, and held at export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from picture_pipeline import (
    CHANNELS,
    FIRST_PINNED,
    PictureNetwork,
    PicturePipeline,
    items_of,
    mask_of,
    picture,
    picture_pipeline,
)
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.outside import OUTSIDE, pins_of
from fewstep.diffusion.ode import OdeSolver
from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.rollout import Sampler, rollout
from fewstep.export import SchedulerCheckError, plan_student
from fewstep.export.walk.check import walk
from fewstep.export.walk.pins import Pinned
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.recording import Recording, RecordingError, record
from fewstep.recording.items import between_steps
from fewstep.recording.pipeline import with_parts

WAYS = ["pinned", "pinned_clean", "pinned_clean_in_place"]


class PinnedBesideReferences(PicturePipeline):
    """Of several pictures the first is pinned, and the network is told the others: so many more entries it answers."""

    way = "pinned"

    def _pictures(self, image: Any, batch: int) -> Tensor:
        if batch > 1:
            raise ValueError("one prompt at a time")
        self._references = [one[None] for one in image[1:]]
        return image[0][None]

    def _ask(self, x: Tensor, t: Tensor, text: Tensor | None, pictures: Tensor, jitter: float, place: int) -> Tensor:
        answer = self.network(torch.cat([x, *self._references], 1), t.expand(1), text=text)[0]
        return answer.unflatten(1, (1 + len(self._references), CHANNELS))[:, 0]


def table() -> DDIMScheduler:
    """A table whose first sample is all noise, though its alpha is a third there."""
    return DDIMScheduler(beta_end=0.004, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")


@pytest.fixture(scope="module")
def recordings() -> dict[str, Recording]:
    """Recordings of pipelines that pin, by their way."""
    made = {way: record(picture_pipeline(way), items=items_of(way)) for way in WAYS}
    return made | {"table": record(picture_pipeline("pinned", table()), items=items_of("pinned"))}


def denoiser_of(recording: Recording) -> NetworkDenoiser:
    return NetworkDenoiser(recording.network, recording.recipe, recording.schedule, recording.prediction_type)


def unpinned(conditioning: Conditioning) -> Conditioning:
    """The same, as if nobody had seen the pins."""
    return Conditioning({name: node for name, node in conditioning.tree.items() if name != OUTSIDE}, 1)


def stock(pipeline: Any, item: dict[str, Any], call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first and the last sample of the pipeline's own walk."""
    seen: list[Tensor] = []
    pipeline = with_parts(pipeline, scheduler=pipeline.scheduler)
    own = pipeline._ask
    pipeline._ask = lambda x, *rest: seen.append(x) or own(x, *rest)
    pipeline._shown = lambda x, _: x
    last = pipeline(**item, **call, generator=torch.Generator().manual_seed(3)).images
    return seen[0], last


@pytest.mark.parametrize("way", [*WAYS, "table"])
def test_pins_are_the_pictures_own(recordings: dict[str, Recording], way: str) -> None:
    recording = recordings[way]
    assert recording.between is not None and recording.between.noised == (not way.startswith("pinned_clean"))
    assert "replaced between steps by the picture's" in recording.summary()
    for number, told in enumerate(recording.condition_each(items=items_of("pinned" if way == "table" else way))):
        pins = pins_of(told)
        assert pins is not None
        where = torch.zeros(1, *recording.sample_shape, dtype=torch.bool)
        if way.startswith("pinned_clean"):
            where[:, :, 0] = True
            wanted = picture(FIRST_PINNED + number)[None, :, None].expand_as(where)
        else:
            where |= mask_of(number)[None] == 0
            wanted = picture(FIRST_PINNED + number)[None]
        assert torch.equal(pins.where, where)
        torch.testing.assert_close(pins.value, wanted * where, rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", [*WAYS, "table"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_own_walks_are_the_pipelines(recordings: dict[str, Recording], way: str, steps: int) -> None:
    recording = recordings[way]
    plan = plan_student(recording, steps, renoise="ode")
    pipeline = with_parts(recording.pipeline, scheduler=plan.scheduler)
    sampler, denoiser = Sampler(plan_schedule := recording.schedule, plan.grid, "ode"), denoiser_of(recording)
    ends = []
    for item in items_of("pinned" if way == "table" else way):
        (told,) = recording.condition_each(items=[item])
        first, last = stock(pipeline, item, plan.call)
        with torch.no_grad():
            end = rollout(denoiser, sampler, first / plan.initial_scale, told)
            again = OdeSolver(denoiser, plan_schedule).to_data(first, plan.grid, told)
            wrong = rollout(denoiser, sampler, first / plan.initial_scale, unpinned(told))
        for own in (end, again):
            assert float((own - last).abs().max()) <= 1e-5 * max(1.0, float(last.abs().max()))
        assert float((wrong - last).abs().max()) > 1e-2
        ends.append(end)
    assert float((ends[0] - ends[1]).abs().max()) > 0.1


def test_fresh_noise_leaves_the_first_noise_in_a_pin(recordings: dict[str, Recording]) -> None:
    recording = recordings["table"]
    (told,) = recording.condition_each(items=items_of("pinned")[:1])
    pins = pins_of(told)
    assert pins is not None
    noise, seen = torch.randn(1, *recording.sample_shape), []
    sampler = Sampler(recording.schedule, (1.0, 0.6, 0.3), "fresh")
    with torch.no_grad():
        rollout(
            denoiser_of(recording),
            sampler,
            noise,
            told,
            lambda k: torch.randn(noise.shape, generator=torch.Generator().manual_seed(k)),
            on_step=lambda _, x: seen.append(x),
        )
    assert torch.equal(seen[0], noise)
    for x, t in zip(seen[1:], sampler.grid[1:], strict=True):
        wanted = add_noise(pins.value, noise, recording.schedule.coefficients(torch.tensor([t])))
        torch.testing.assert_close(x[pins.where], wanted[pins.where], rtol=0, atol=1e-5)
        assert float((x - wanted)[~pins.where].abs().max()) > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_pinned_entries_have_no_loss(recordings: dict[str, Recording], way: str) -> None:
    recording = recordings[way]
    told = recording.condition(items=items_of(way))
    pins, denoiser = pins_of(told), denoiser_of(recording)
    assert pins is not None
    x, t = torch.randn(2, *recording.sample_shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    x0 = denoiser(x, t, told)
    torch.testing.assert_close(x0[pins.where], pins.value[pins.where], rtol=0, atol=1e-5)
    raw = denoiser.raw(x, t, told)
    gradients = torch.autograd.grad(raw[pins.where].sum(), list(recording.network.parameters()), allow_unused=True)
    assert all(gradient is None or not bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("way", [*WAYS, "table"])
def test_the_check_at_export_holds_what_is_pinned(recordings: dict[str, Recording], way: str) -> None:
    recording = recordings[way]
    plan = plan_student(recording, 2, renoise="ode")
    pipeline = with_parts(recording.pipeline, scheduler=plan.scheduler)
    items = items_of("pinned" if way == "table" else way)

    def check(pinned: Pinned | None) -> None:
        arguments = {**items[0], **plan.call, "generator": torch.Generator().manual_seed(0)}
        moved = (recording.schedule, recording.prediction_type, plan.move, lambda _: recording.component)
        walk(pipeline, arguments, *moved, pinned=pinned)

    own, (other,) = Pinned.of(recording), recording.condition_each(items=[{**items[0], "image": picture(9)}])
    pins = pins_of(other)
    assert own is not None and pins is not None
    check(own)
    with pytest.raises(SchedulerCheckError, match="what it pins is not the picture"):
        check(replace(own, value=pins.value.double()))
    with pytest.raises(SchedulerCheckError, match=r"does not lead to the teacher's x_t|does not start from unit noise"):
        check(None)
    assert plan.counts == (1, 2)


def test_an_item_of_which_all_is_kept_is_refused(recordings: dict[str, Recording]) -> None:
    item = {**items_of("pinned")[0], "mask": torch.zeros(1, 4, 4)}
    with pytest.raises(RecordingError, match="keeps every entry of the sample of item 0, so there is nothing to make"):
        recordings["pinned"].condition_each(items=[item])
    (told,) = recordings["pinned"].condition_each(items=[{**item, "mask": torch.ones(1, 4, 4)}])
    pins = pins_of(told)
    assert pins is not None and not bool(pins.where.any())


def test_an_item_of_more_references_than_the_recorded_one_is_pinned_as_it_is() -> None:
    """What stands in for the network's answer to the recorded item has not the form of the answer to this one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = PinnedBesideReferences(PictureNetwork(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)
    items = items_of("pinned", 3)
    for number, item in enumerate(items):
        item["image"] = [item["image"], *(picture(10 * number + place) for place in range(3 if number == 2 else 1))]
    recording = record(pipeline, items=items[:2])
    recording.prove()
    x, t = torch.randn(1, *recording.sample_shape), torch.tensor([0.6], dtype=torch.float64)
    for number, told in enumerate(recording.condition_each(items=items)):
        pins = pins_of(told)
        assert pins is not None and torch.equal(pins.where[0], (mask_of(number) == 0).expand(CHANNELS, -1, -1))
        torch.testing.assert_close(pins.value, items[number]["image"][0][None] * pins.where, rtol=0, atol=2e-6)
        assert denoiser_of(recording)(x, t, told).shape == x.shape


def test_no_item_is_watched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the second noise, by which a tail is told from the sample."""
    own, watched = between_steps._watch, list[tuple[str, int]]()

    def noted(subject: Any, check: Any, item: Any, seed: int = 0, fresh: int = 0) -> Any:
        watched.append((str(item), fresh))
        return own(subject, check, item, seed, fresh)

    monkeypatch.setattr(between_steps, "_watch", noted)
    record(picture_pipeline("pinned_clean"), items=items_of("pinned_clean"))
    assert sorted(watched) == [("item 0", 0), ("item 0", 1), ("item 1", 0)]


def test_what_is_pinned_anew_is_refused() -> None:
    words = "24 entries of its sample between steps, and they become neither those of .* give jitter=0 in the call"
    with pytest.raises(RecordingError, match=words):
        record(picture_pipeline("pinned_anew"), items=items_of("pinned_anew"))
    record(picture_pipeline("pinned_anew"), items=items_of("pinned_anew"), jitter=0.0).prove()
