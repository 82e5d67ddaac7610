"""Pairs of noise and sample on the disk: both ends of a teacher's ODE, made once and read by any number of runs.

A folder of pairs is one of :mod:`fewstep.data.shards`: row i holds ``x0`` and ``item``, the number of the prompt or
label that it was made for. Its noise is not stored, but drawn again from (seed, i). Where the ODE was followed up from
real images, ``noise`` is stored too, because no seed gives it.

A batch is a run of rows inside one shard, whoever makes it, so the pairs do not depend on the number of processes.

Samples of several sizes are stored flat, each at the beginning of a row that has room for the largest.

A run that is too short to use all its pairs makes those alone that it will use: then row i holds the pair that its
stream asks for as the i-th, so that a run which is gone on with for more steps only adds rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data.conditions import Conditions
from fewstep.data.durable import json_sha256
from fewstep.data.items import known_by
from fewstep.data.real import RealSamples
from fewstep.data.shards import Shards
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import PAIRS_STEP, Draws, keyed_order
from fewstep.diffusion.ode import OdeSolver, inversion_times, teacher_times
from fewstep.diffusion.prediction import add_noise
from fewstep.errors import UserError
from fewstep.reading import Kinds, misfit
from fewstep.recording import Recording

FORMAT = "fewstep-pairs-3"
#: Of the pairs of one run, in the order in which it uses them.
RUN_FORMAT = "fewstep-run-pairs-1"
MAKER = "fewstep pairs"
_OF_PAIRS: Kinds = {
    "source": str,
    "teacher": dict,
    "conditions": dict,
    "shape": list,
    "seed": int,
    "guidance_scale": (int, float, list),
}


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Attributes:
        num: how many.
        steps: of the teacher's ODE.
        solver: of :data:`fewstep.diffusion.ode.SOLVERS`.
        shift: of a flow teacher's time grid, else 1.
        guidance_scale: that the denoiser is under, a list where it changes with the time; for the record.
        seed: of the noise.
        batch_size: samples in one call; part of the result, which follows it by rounding errors.
        shard_size: rows of a file, which is also what is lost when a process is killed.
        dtype: of the stored x0: float32, float16 or bfloat16.
        mixed_precision: of the teacher: no or bf16; for the record.
    """

    num: int
    steps: int = 25
    solver: str = "euler"
    shift: float = 1.0
    guidance_scale: float | list[float] = 1.0
    seed: int = 0
    batch_size: int = 16
    shard_size: int = 256
    dtype: str = "float32"
    mixed_precision: str = "no"


class PairMaker:
    """Makes a folder of pairs, alone or with other processes.

    Args:
        folder: of the pairs.
        recording: of the teacher.
        identity: its :func:`teacher_digest`, taken before adapters were put into its network.
        denoiser: the teacher, under guidance where it is to be.
        conditions: what to generate for; every item is used as often as any other, in a keyed order.
        settings: how.
        device: where the network is.
        real: real samples, from which the ODE is followed to their noise instead.
        resume: go on with what is there.
        numbers: make these pairs alone, in this order (:func:`fewstep.data.pair_stream.numbers_used`); default: all.
        images_digest: of the real samples' images, so that the folder is not gone on with from others; None: they are
            known to be the same.

    Raises:
        UserError: the folder is in use or holds other pairs, or the samples are real and of several sizes.
    """

    def __init__(
        self,
        folder: Path,
        recording: Recording,
        identity: dict[str, str],
        denoiser: Denoiser,
        conditions: Conditions,
        settings: PairSettings,
        device: torch.device | str,
        real: RealSamples | None = None,
        resume: bool = False,
        numbers: Sequence[int] | None = None,
        images_digest: str | None = None,
    ) -> None:
        if real is not None:
            refuse_real_of_sizes(recording)
        self.numbers = numbers
        self.conditions, self.settings, self.device, self.real = conditions, settings, device, real
        self.schedule, self.shape = recording.schedule, stored_shape(conditions)
        self.ode_solver = OdeSolver(denoiser, self.schedule, settings.solver)
        self.rows = real.rows_among(conditions) if real is not None else None
        about = {
            "format": FORMAT if numbers is None else RUN_FORMAT,
            "source": "noise" if real is None else "images",
            "teacher": identity,
            "conditions": conditions_digest(conditions),
            "shape": list(self.shape),
            **vars(settings),
            **({} if images_digest is None else {"images": images_digest}),
        }
        wanted = None if numbers is None else len(numbers)
        self.shards = Shards.begin(folder, about, MAKER, resume=resume, wanted=wanted)

    def run(self, rank: int = 0, world: int = 1, on_rows: Callable[[int], object] = lambda count: None) -> None:
        """Make this process's shards, every ``world``-th; what is whole already is left as it is.

        Args:
            rank: of this process, from 0.
            world: how many processes share the work.
            on_rows: called with the number of rows whenever some are done.

        Raises:
            UserError: the disk is full; complete shards are untouched.
        """
        for number in self.shards.numbers[rank::world]:
            rows = self.shards.rows(number)
            if self.shards.is_whole(number):
                on_rows(len(rows))
                continue
            parts: list[dict[str, Tensor]] = []
            for first in range(rows.start, rows.stop, self.settings.batch_size):
                batch = range(first, min(first + self.settings.batch_size, rows.stop))
                parts.append(self.pairs(batch if self.numbers is None else [self.numbers[row] for row in batch]))
                on_rows(len(batch))
            self.shards.write(number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @torch.no_grad()
    def pairs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What is stored of some pairs, by number: ``x0``, ``item``, and ``noise`` of real samples; on the CPU."""
        settings, dtype = self.settings, getattr(torch, self.settings.dtype)
        if self.real is None:
            items = items_of_pairs(self.conditions, settings.seed, indices)
            x0 = self._made(indices, items)
            return {"x0": x0.to("cpu", dtype), "item": torch.tensor(items)}
        noise = pair_noise(settings.seed, indices, self.shape, self.device)
        # Folders are sorted by class: the first images would be those of a few.
        assert self.rows is not None  # as there are real samples
        images = [keyed_order(settings.seed, "images", len(self.real), index) for index in indices]
        items = [self.rows[image] for image in images]
        x0 = self.real.x0(images)
        times = inversion_times(self.schedule, settings.steps, settings.shift)
        # A little noise to begin with: of a clean sample no network can say where it came from.
        cleanest = torch.full((len(indices),), times[0], dtype=torch.float64, device=x0.device)
        x_t = add_noise(x0, noise, self.schedule.coefficients(cleanest))
        x_t = self.ode_solver.to_noise(x_t, times, self.conditions.select(items))
        noise = x_t / self.schedule.initial_scale()
        return {"x0": x0.to("cpu", dtype), "item": torch.tensor(items), "noise": noise.float().cpu()}

    def _made(self, indices: Sequence[int], items: Sequence[int]) -> Tensor:
        """The teacher's samples (B, *shape) of the noise of some pairs, for these items."""
        times = teacher_times(self.schedule, self.settings.steps, self.settings.shift)
        shapes = [self.conditions.shape(item) for item in items]
        made: dict[int, Tensor] = {}
        for shape in dict.fromkeys(shapes):
            places = [place for place, one in enumerate(shapes) if one == shape]
            noise = pair_noise(self.settings.seed, [indices[place] for place in places], shape, self.device)
            told = self.conditions.select([items[place] for place in places])
            x0 = self.ode_solver.to_data(self.schedule.initial_scale() * noise, times, told)
            if shape != self.shape:
                x0 = torch.nn.functional.pad(x0.flatten(1), (0, self.shape[0] - math.prod(shape)))
            made |= dict(zip(places, x0, strict=True))
        return torch.stack([made[place] for place in range(len(items))])


def stored_shape(conditions: Conditions) -> tuple[int, ...]:
    """What a stored sample has: its own shape, or of samples of several sizes that of the largest one, flat."""
    shapes = [shape for shape, _ in conditions.sizes()]
    return shapes[0] if len(shapes) == 1 else (max(map(math.prod, shapes)),)


def refuse_real_of_sizes(recording: Recording) -> None:
    """Raise :class:`UserError` where samples are of several sizes, at which no pairs of real ones are made."""
    if recording.sizes:
        raise UserError(
            "pairs of real samples (--data, --inverted_pairs) are of one size, and the items' samples are of "
            f"{1 + len(recording.sizes)}: leave them out, or give items of one size"
        )


def items_of_pairs(conditions: Conditions, seed: int, indices: Sequence[int]) -> list[int]:
    """The numbers of the items that the pairs with these numbers are made for."""
    return [keyed_order(seed, "pairs", len(conditions), index) for index in indices]


class StoredPairs:
    """A complete folder of pairs of a certain teacher.

    Args:
        folder: that ``fewstep pairs`` made.
        identity: the teacher's :func:`teacher_digest`.
        conditions: the run's; the pairs' items count in them.
        numbers: that the folder was made with; default: it holds all.

    Raises:
        UserError: there are none, they are of another teacher or for other conditions, not complete, or damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: dict[str, str],
        conditions: Conditions,
        numbers: Sequence[int] | None = None,
    ) -> None:
        kind, wanted = (FORMAT, None) if numbers is None else (RUN_FORMAT, len(numbers))
        self.shards = Shards.find(Path(folder), kind, MAKER, wanted)
        self._place = None if numbers is None else {number: place for place, number in enumerate(numbers)}
        self.about = self.shards.about
        self._shape = conditions.shape
        if wrong := misfit(self.about, _OF_PAIRS):
            raise _useless(folder, f"of its about.json, {wrong}")
        for name, mine in (("teacher", identity), ("conditions", conditions_digest(conditions))):
            theirs = self.about[name]
            differing = sorted(p for p in mine.keys() | theirs.keys() if mine.get(p) != theirs.get(p))
            if differing and name == "teacher":
                raise UserError(
                    f"the pairs in {folder} are of another teacher: its {', '.join(differing)} differs; "
                    f"make pairs of this one with {MAKER}"
                )
            if differing:
                raise UserError(
                    f"the pairs in {folder} were made for other prompts or classes; give those that they were made for"
                )
        self._refuse_misshapen(len(conditions))

    def _refuse_misshapen(self, conditions: int) -> None:
        """Raise where the digests agree and the rows are no pairs: anybody can make a digest."""
        noise_is_stored = self.about["source"] == "images"
        for number in self.shards.numbers:
            shapes, rows = self.shards.shapes(number), len(self.shards.rows(number))
            sample = [rows, *self.about["shape"]]
            held = {"x0": sample, "item": [rows], **({"noise": sample} if noise_is_stored else {})}
            if {name: [rows, *shape[1:]] for name, shape in shapes.items()} != held:
                raise _useless(self.shards.folder, f"{self.shards.path(number).name} holds {shapes}")
            items = self.shards.column(number, "item")
            if items.is_floating_point() or not 0 <= int(items.min()) <= int(items.max()) < conditions:
                raise _useless(self.shards.folder, f"{self.shards.path(number).name} is for other prompts or classes")

    def __len__(self) -> int:
        return int(self.about["num"])

    @property
    def numbers(self) -> Sequence[int]:
        """Of the pairs that it holds."""
        return range(len(self)) if self._place is None else [*self._place]

    def __contains__(self, number: int) -> bool:
        return number in (range(len(self)) if self._place is None else self._place)

    def row(self, index: int) -> tuple[Tensor, Tensor, int]:
        """x0 (...) and noise (...) of the pair with this number, float32 on the CPU, and the number of its item."""
        row = self.shards.row(index if self._place is None else self._place[index])
        x0, item = row["x0"].float(), int(row["item"])
        shape = self._shape(item)
        noise = row["noise"] if "noise" in row else pair_noise(self.about["seed"], [index], shape)[0]
        return x0 if x0.shape == shape else x0[: math.prod(shape)].reshape(shape), noise, item


def _useless(folder: str | Path, why: str) -> UserError:
    return UserError(f"the pairs in {folder} cannot be used: {why}; make them again with {MAKER}")


def pair_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The unit noise (B, *shape), float32, of the pairs with these numbers, drawn anew."""
    return Draws(seed, PAIRS_STEP, indices, device).normal("pair_noise", shape)


def conditions_digest(conditions: Conditions) -> dict[str, str]:
    """The digest of the prompts, labels or items, in their order."""
    return {"items": json_sha256([conditions.kind, known_by(conditions.items())])}
