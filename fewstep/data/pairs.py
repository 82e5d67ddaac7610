"""Pairs of noise and sample on the disk: both ends of a teacher's ODE, made once and read by any number of runs.

A folder of pairs is one of :mod:`fewstep.data.shards`: row i holds ``x0`` and ``item``, the number of the prompt or
label that it was made for. Its noise is not stored, but drawn again from (seed, i). Where the ODE was followed up from
real images, ``noise`` is stored too, because no seed gives it.

A batch is a run of rows inside one shard, whoever makes it, so the pairs do not depend on the number of processes.

A run that is too short to use all its pairs makes those alone that it will use: then row i holds the pair that its
stream asks for as the i-th, so that a run which is gone on with for more steps only adds rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.config.pairs import PairsWanted
from fewstep.data.batch import Pairs
from fewstep.data.conditions import Conditions
from fewstep.data.durable import json_sha256
from fewstep.data.items import known_by
from fewstep.data.real import RealSamples
from fewstep.data.shards import Shards
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.draws import PAIRS_STEP, Draws, keyed_generator, keyed_order
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
_STREAM, _INVERTED_STREAM = "pairs", "inverted pairs"


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
        numbers: make these pairs alone, in this order (:func:`numbers_used`); default: all.
        images_digest: of the real samples' images, so that the folder is not gone on with from others; None: they are
            known to be the same.

    Raises:
        UserError: the folder is in use or holds other pairs.
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
        self.numbers = numbers
        self.conditions, self.settings, self.device, self.real = conditions, settings, device, real
        self.schedule, self.shape = recording.schedule, recording.sample_shape
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
        noise = pair_noise(settings.seed, indices, self.shape, self.device)
        if self.real is None:
            items = [keyed_order(settings.seed, "pairs", len(self.conditions), index) for index in indices]
            times = teacher_times(self.schedule, settings.steps, settings.shift)
            x0 = self.ode_solver.to_data(self.schedule.initial_scale() * noise, times, self.conditions.select(items))
            return {"x0": x0.to("cpu", dtype), "item": torch.tensor(items)}
        # Folders are sorted by class: the first images would be those of a few.
        assert self.rows is not None  # as there are real samples
        images = [keyed_order(settings.seed, "images", len(self.real.images), index) for index in indices]
        items = [self.rows[image] for image in images]
        x0 = self.real.x0(images)
        times = inversion_times(self.schedule, settings.steps, settings.shift)
        # A little noise to begin with: of a clean sample no network can say where it came from.
        cleanest = torch.full((len(indices),), times[0], dtype=torch.float64, device=x0.device)
        x_t = add_noise(x0, noise, self.schedule.coefficients(cleanest))
        x_t = self.ode_solver.to_noise(x_t, times, self.conditions.select(items))
        noise = x_t / self.schedule.initial_scale()
        return {"x0": x0.to("cpu", dtype), "item": torch.tensor(items), "noise": noise.float().cpu()}


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

    def row(self, index: int) -> tuple[Tensor, Tensor, int]:
        """x0 (...) and noise (...) of the pair with this number, float32 on the CPU, and the number of its item."""
        row = self.shards.row(index if self._place is None else self._place[index])
        noise = row["noise"] if "noise" in row else pair_noise(self.about["seed"], [index], self.about["shape"])[0]
        return row["x0"].float(), noise, int(row["item"])


class PairStream:
    """The pairs of a run, in a keyed order: a :class:`fewstep.data.batch.Source`.

    Args:
        pairs: made from noise.
        conditions: the run's.
        device: where batches are put.
        inverted: real samples with the noise that the ODE leads them to.
        share: of the samples that are drawn from ``inverted``.
    """

    def __init__(
        self,
        pairs: StoredPairs,
        conditions: Conditions,
        device: torch.device | str,
        inverted: StoredPairs | None = None,
        share: float = 0.0,
    ) -> None:
        self.pairs, self.conditions, self.device, self.inverted, self.share = pairs, conditions, device, inverted, share

    def batch(self, seed: int, positions: Sequence[int]) -> Pairs:
        """The pairs at these places of the run's endless stream."""
        rows = [self._row(seed, position) for position in positions]
        x0 = torch.stack([x0 for x0, _, _ in rows]).to(self.device, non_blocking=True)
        noise = torch.stack([noise for _, noise, _ in rows]).to(self.device, non_blocking=True)
        return Pairs(x0, noise, self.conditions.select([item for _, _, item in rows]))

    def _row(self, seed: int, position: int) -> tuple[Tensor, Tensor, int]:
        store, name = self.pairs, _STREAM
        if self.inverted is not None and _is_inverted(seed, position, self.share):
            store, name = self.inverted, _INVERTED_STREAM
        return store.row(keyed_order(seed, name, len(store), position))


def _useless(folder: str | Path, why: str) -> UserError:
    return UserError(f"the pairs in {folder} cannot be used: {why}; make them again with {MAKER}")


def numbers_used(wanted: PairsWanted, num: int, seed: int, positions: int, *, inverted: bool) -> list[int]:
    """The pairs that a :class:`PairStream` asks for at its first places, each once, in the order of their first use.

    Args:
        wanted: by the run.
        num: how many pairs the stream goes through.
        seed: of the run.
        positions: how many places of the stream the run uses.
        inverted: those of real samples are meant.
    """
    mixed = wanted.invert_real or wanted.inverted is not None
    name = _INVERTED_STREAM if inverted else _STREAM
    used: dict[int, None] = {}
    for position in range(positions):
        if len(used) == num:
            break
        if not mixed or _is_inverted(seed, position, wanted.inverted_share) == inverted:
            used[keyed_order(seed, name, num, position)] = None
    return list(used)


def _is_inverted(seed: int, position: int, share: float) -> bool:
    """Whether a place of a mixed stream has a pair of a real sample."""
    return float(torch.rand((), generator=keyed_generator(seed, "inverted", position))) < share


def pair_noise(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """The unit noise (B, *shape), float32, of the pairs with these numbers, drawn anew."""
    return Draws(seed, PAIRS_STEP, indices, device).normal("pair_noise", shape)


def conditions_digest(conditions: Conditions) -> dict[str, str]:
    """The digest of the prompts, labels or items, in their order."""
    return {"items": json_sha256([conditions.kind, known_by(conditions.items())])}
