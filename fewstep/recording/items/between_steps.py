"""What a pipeline does to an item's sample outside of its network: entries that it pins between steps, and its tail.

Seen in runs whose scheduler returns fresh noise and whose network is a stub. An entry that the next step finds changed
is pinned: to a constant of the item, or to alpha' c + sigma' n of one, with the first noise n. An entry of the
decoder's input that two runs of other noise leave as it is comes from the item, and belongs to the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import Item
from fewstep.conditioning.outside import Pins, with_outside
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.items.check import ItemCheck
from fewstep.recording.items.redrawn import say_what_stops
from fewstep.recording.loop.fresh import fresh_samples
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.item_fit import RedrawnError
from fewstep.recording.watch.finite import refuse_unfinite_conditioning
from fewstep.recording.watch.observation import Observation, Step, Stub
from fewstep.recording.watch.subject import Subject

# Three times after the first: two tell a picture from its noise, and one says whether it was right.
_STEPS = 4
# Relative to the largest entry; the equations of two times make rounding errors a few times larger.
_CLOSE, _CLOSE_IN_HALF = 1e-4, 3e-2


class Watched(NamedTuple):
    """A run of an item, what its scheduler returned in each step, and whether the network itself answered in it."""

    seen: Observation
    given: list[Tensor]
    answered: bool


@dataclass(frozen=True)
class BetweenSteps:
    """How a pipeline changes samples of items outside of its network.

    Attributes:
        subject: the pipeline with guidance off.
        schedule: alpha and sigma.
        noised: whether what is pinned is noised to the time of the next step; None: nothing is pinned.
        clean: which entries are pinned as they are, the same for every item: bool, *sample_shape; None: none are.
        tail: (n,) int64, which entries of the decoder's input, flattened, are an item's own; None: none are.
        decoded: the shape of the decoder's input; () where there is no tail.
        repaints: a change to an item's arguments with which nothing is pinned (a mask that is all white); None: which
            entries are pinned does not follow such an argument.
        check: runs the pipeline for one item after the other.
    """

    subject: Subject
    schedule: NoiseSchedule
    noised: bool | None
    clean: Tensor | None
    tail: Tensor | None
    decoded: tuple[int, ...]
    repaints: dict[str, Any] | None
    check: ItemCheck = field(repr=False)

    def describe(self) -> list[str]:
        """One text for each kind."""
        texts = []
        if self.noised is not None:
            form = "under the first noise" if self.noised else "as they are"
            texts.append(f"entries of the sample are replaced between steps by the picture's, {form}")
        if self.tail is not None:
            texts.append(f"{len(self.tail)} entries of the decoder's input come from the item")
        return texts

    @property
    def bare(self) -> Item:
        """The recorded item, with nothing pinned of it where an argument decides that."""
        item: Item = self.subject.invocation.item
        return item if self.repaints is None else Item({**item.arguments, **self.repaints}, f"{item}, all repainted")

    def watch(self, item: Item, seed: int) -> Watched:
        """The run of an item, told in its first step what `told` of :class:`Recorded` wants, as `seed` draws it."""
        watched = _watch(self.subject, self.check, item, seed)
        calls, arguments = watched.seen.steps[0].calls, self.subject.call(_STEPS, [item], seed=seed)
        refuse_unfinite_conditioning(self.subject.pipeline, calls, arguments)
        return watched

    def added(self, told: Conditioning, item: Item, watched: Watched) -> Conditioning:
        """What an item is told, with its pins and its tail.

        Raises:
            RecordingError: the pipeline pins other entries of it than of the recorded item, or in another way, or all.
        """
        pins = tail = None
        if self.noised is not None:
            where = pinned_places(watched)
            if self.clean is not None and not torch.equal(where, self.clean):
                raise RecordingError(
                    f"{item} takes the place of other entries of the sample of {self.subject} than the recorded item "
                    "does; items that are placed elsewhere need a run of their own"
                )
            if bool(where.all()):
                raise RecordingError(
                    f"{self.subject} keeps every entry of the sample of {item}, so there is nothing to make; give it a "
                    "mask that leaves a part"
                )
            noised, value = _value(self.subject, watched, where, self.schedule)
            if bool(where.any()) and noised != self.noised:
                raise RecordingError(
                    f"{self.subject} pins {item} in another way than the recorded item; such items need a run of their "
                    "own"
                )
            pins = Pins(where[None].to(value.device), value)
        if self.tail is not None:
            z = watched.seen.decoder_input
            if z is None or tuple(z.shape) != self.decoded:
                shape = "none" if z is None else str(list(z.shape))
                raise RecordingError(
                    f"{item} does not come to the decoder of {self.subject} as the recorded item does: {shape}, and "
                    f"{list(self.decoded)} of that; such items need a run of their own"
                )
            tail = z.flatten()[self.tail.to(z.device)][None]
        return with_outside(told, pins, tail)


def see_between(subject: Subject, recipe: Recipe, schedule: NoiseSchedule, check: ItemCheck) -> BetweenSteps | None:
    """What a pipeline does to its items' samples outside of its network; None: nothing.

    Args:
        subject: the pipeline with guidance off.
        recipe: how its network is called.
        schedule: alpha and sigma.
        check: runs the pipeline for one item after the other.

    Raises:
        RecordingError: it does what is neither.
    """
    item, other = subject.invocation.item, subject.invocation.other
    plain = pinned = _watch(subject, check, item)
    if not _pins(plain):
        pinned = _watch(subject, check, other)  # of which a mask may keep something
    where, noised, clean, repaints = pinned_places(pinned), None, None, None
    if bool(where.any()):
        try:
            noised, _ = _value(subject, pinned, where, schedule)
        except RedrawnError as error:
            raise say_what_stops(error, subject, partial(_check_pins, schedule, check, where)) from error
        if noised:
            repaints = _what_repaints(subject, check)
        else:
            clean = where
            both = plain, _watch(subject, check, other) if pinned is plain else pinned
            _check_clean(subject, recipe, clean, [pinned_places(one) for one in both])
    found = BetweenSteps(subject, schedule, noised, clean, None, (), repaints, check)
    one = plain if found.bare is item else _watch(subject, check, found.bare)
    tail = _tail(one, _watch(subject, check, found.bare, fresh=1))
    if tail is None:
        return None if noised is None else found
    assert one.seen.decoder_input is not None  # it has a tail
    return replace(found, tail=tail, decoded=tuple(one.seen.decoder_input.shape))


def pinned_places(watched: Watched) -> Tensor:
    """Which entries of the sample a pipeline replaces after each step: bool, without the batch axis, on the CPU."""
    steps = watched.seen.steps
    where = torch.zeros(steps[0].sample.shape[1:], dtype=torch.bool)
    for given, step in zip(watched.given, steps[1:], strict=False):
        where |= (given.to(step.sample) != step.sample)[0].cpu()
    return where


def _pins(watched: Watched) -> bool:
    return bool(pinned_places(watched).any())


def _watch(subject: Subject, check: ItemCheck, item: Item, seed: int = 0, fresh: int = 0) -> Watched:
    drawn, given = fresh_samples(2), list[Tensor]()

    def replaced(index: int, sample: Tensor) -> Tensor:
        noise = drawn(index, sample)
        # Apart from any picture, and from another run's: in half precision numbers of one size are often equal.
        given.append(noise + (8 + 4 * fresh) * noise.float().std().to(noise))
        return given[-1]

    def make(stub: Stub) -> Observation:
        given.clear()
        return subject.run(_STEPS, [item], seed=seed, stub=stub, replace=replaced, stop_at_decode=True)

    seen, answered = check.run(make)
    return Watched(seen, given, answered)


def _value(subject: Subject, watched: Watched, where: Tensor, schedule: NoiseSchedule) -> tuple[bool, Tensor]:
    """Whether the pinned entries are noised, and what they are when they are clean: (1, *sample_shape), 0 elsewhere.

    Raises:
        RedrawnError: they are neither constant nor alpha c + sigma n with the walk's first noise n.
    """
    first, *steps = watched.seen.steps
    like, value = first.network_input, torch.zeros_like(first.network_input)
    if all(torch.equal(step.network_input[:, where], steps[0].network_input[:, where]) for step in steps):
        value[:, where] = steps[0].network_input[:, where]
        return False, value
    x = [_x_t(step, schedule)[:, where] for step in (first, *steps)]
    near, last = (_coefficients(step, schedule) for step in (steps[0], steps[-1]))
    determinant = near[0] * last[1] - near[1] * last[0]
    clean = (last[1] * x[1] - near[1] * x[-1]) / determinant
    noise = (near[0] * x[-1] - last[0] * x[1]) / determinant
    allowed = (_CLOSE if like.dtype.itemsize >= 4 else _CLOSE_IN_HALF) * max(float(part.abs().max()) for part in x)
    share = float((x[0] * noise).sum() / noise.square().sum())
    off = [(x[0] - share * noise) / max(share, 1e-6)]
    for step, seen in zip(steps, x[1:], strict=True):
        alpha, sigma = _coefficients(step, schedule)
        off.append(seen - alpha * clean - sigma * noise)
    if not max(float(part.abs().max()) for part in off) <= allowed:
        raise RedrawnError(
            f"{subject} changes {int(where.sum())} entries of its sample between steps, and they become neither those "
            "of its picture nor these under the first noise"
        )
    value[:, where] = clean.to(value)
    return True, value


def _check_pins(schedule: NoiseSchedule, check: ItemCheck, where: Tensor, subject: Subject) -> None:
    """Raise where other entries than these are pinned, or what they become is neither constant nor a noised picture."""
    watched = _watch(subject, check, subject.invocation.item)
    if len(watched.seen.steps) != _STEPS or not torch.equal(pinned_places(watched), where):
        raise RecordingError("other entries are pinned")
    _value(subject, watched, where, schedule)


def _x_t(step: Step, schedule: NoiseSchedule) -> Tensor:
    scale = schedule.input_scale(_time(step, schedule))
    return step.network_input.double().cpu() / scale.reshape(-1, *[1] * (step.network_input.dim() - 1))


def _coefficients(step: Step, schedule: NoiseSchedule) -> tuple[float, float]:
    alpha, sigma = schedule.coefficients(_time(step, schedule))
    return float(alpha), float(sigma)


def _time(step: Step, schedule: NoiseSchedule) -> Tensor:
    return schedule.time(torch.tensor([step.timestep], dtype=torch.float64))


def _what_repaints(subject: Subject, check: ItemCheck) -> dict[str, Any] | None:
    """Which picture of the item, all white or all black, leaves nothing pinned: it says where, and not what."""
    for name, value in subject.invocation.item.pictures.items():
        for bare in _bare(value):
            changes = {name: bare}
            item = Item({**subject.invocation.item.arguments, **changes}, "an item of which nothing is kept")
            try:
                watched = _watch(subject, check, item)
            except RecordingError:
                continue
            if not _pins(watched):
                return changes
    return None


def _bare(value: Any) -> Iterator[Any]:
    """A picture all white, then all black; of a list each."""
    for white in (True, False):
        yield _filled(value, white)


def _filled(value: Any, white: bool) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_filled(child, white) for child in value)
    if isinstance(value, PIL.Image.Image):
        black = PIL.Image.new(value.mode, value.size)
        return PIL.Image.eval(black, lambda _: 255) if white else black
    if isinstance(value, np.ndarray):
        return np.full_like(value, (255 if value.dtype == np.uint8 else 1) * white)
    return torch.full_like(value, float(white))


def _check_clean(subject: Subject, recipe: Recipe, clean: Tensor, places: Sequence[Tensor]) -> None:
    """Raise where these items are pinned elsewhere, or where the network reads what is pinned as it is."""
    same = all(torch.equal(where, clean) for where in places)
    if not same or bool((recipe.read & clean).any()):
        raise RecordingError(
            f"{subject} replaces entries of its sample between steps by its picture as it is, "
            + ("and the network reads them from the sample" if same else "and for each item others")
            + f"; it cannot be recorded: {ANOTHER}"
        )


def _tail(one: Watched, other: Watched) -> Tensor | None:
    """Which entries of the decoder's input do not follow the sample; None: all do, or none does."""
    a, b = one.seen.decoder_input, other.seen.decoder_input
    if a is None or b is None or a.shape != b.shape or isinstance(a, FakeTensor):
        return None  # a plan has no values, and nothing to decode
    still = (a == b).flatten().nonzero().flatten().cpu()
    return still if 0 < len(still) < a.numel() else None
