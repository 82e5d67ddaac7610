"""The samples of one row: made once, in chunks that any number of processes share, and found again after a kill.

What is kept in the evaluation's folder, for a row called NAME:

- ``images/NAME/000012.png``: sample 12; the frames of a video lie below each other. All samples, or those shown.
- ``images/NAME/manifest.jsonl``: index, seed, prompt or label, file and SHA-256 of every picture.
- ``samples/NAME``: shards that say of each sample how many evaluations it took, and what its picture's digest is.
- ``features/VIEW/NAME``: shards of what an extractor or a scorer makes of each sample.

A chunk is complete where its shards are; what is missing is made again, from the pictures where they are all there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.durable import json_sha256, write_text_durably
from fewstep.data.image_opening import UNREADABLE, opened
from fewstep.data.shards import Shards, begun_about
from fewstep.errors import UserError
from fewstep.eval.grid import to_pil
from fewstep.eval.scorers.scorer import Asked
from fewstep.eval.viewers import BLOCK, View, look
from fewstep.training.distributed import Processes

_MAKER, _AGAIN = "fewstep eval", "start it again"
_COMPRESSION = 1  # of PNG, without loss: the usual takes three times as long, and saves a seventh
_FORMAT, _SEEN_FORMAT = "fewstep-samples-1", "fewstep-seen-1"


@dataclass(frozen=True)
class Made:
    """Some finished samples: uint8 (n, [F,] C, H, W), and the denoiser evaluations that each took."""

    images: Tensor
    evaluations: float = 0.0


class Source(Protocol):
    """Where samples come from: a pipeline, or a folder of images."""

    @property
    def name(self) -> str:
        """Of its folders: letters that any system takes."""
        ...

    @property
    def num(self) -> int:
        """How many samples there are."""
        ...

    @property
    def content(self) -> Mapping[str, Any] | None:
        """All that the samples depend on; None where nothing identifies it, and nothing of it is used again."""
        ...

    def make(self, indices: Sequence[int]) -> Iterator[Made]:
        """These samples, in their order."""
        ...

    def describe(self, index: int) -> Mapping[str, Any]:
        """What the manifest says of a sample: its seed, and what it is asked for."""
        ...

    def asked(self, indices: Sequence[int]) -> Asked:
        """The prompts or items of samples, or None where they have none."""
        ...


@dataclass
class SampleSet:
    """The samples of one source, as they are looked at.

    Args:
        source: where they come from.
        out: folder of the evaluation.
        views: who looks at them.
        kept: so many pictures are kept, the first ones.
        batch_size: samples that are made at once.
        processes: that share the work.
    """

    source: Source
    out: Path
    views: Sequence[View]
    kept: int
    batch_size: int
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        content = self.source.content
        identity = json_sha256(content)[:16] if content is not None else "unidentified"
        self.name = f"{self.source.name}-{identity}"
        self.images = self.out / "images" / self.name

    def complete(self, on_samples: Callable[[int], object] = lambda count: None) -> None:
        """Make what is missing. Every process calls it; ``on_samples`` hears how many this one has made.

        Raises:
            UserError: on every process, where one of them could not make its part.
        """
        if self.source.content is None:
            self.processes.of_main(self._forget)
        self.processes.of_main(lambda: self._begin() and None)
        self._made, self._seen = self._begin()
        todo = self.processes.of_main(self._missing)
        refused: tuple[type[UserError], str] | None = None
        try:
            for number in todo[self.processes.rank :: self.processes.count]:
                self._complete(number, on_samples)
        except UserError as error:
            refused = type(error), str(error)
        if (refused := self.processes.first(refused)) is not None:
            raise refused[0](refused[1])
        self._made, self._seen = self._begin()  # anew: what was read of a shard that another process replaced is gone
        self.processes.of_main(self._write_manifest)

    @property
    def shape(self) -> tuple[int, ...]:
        """([F,] C, H, W) of a sample."""
        return self._shape_of(0)

    def column(self, kind: str, name: str) -> Tensor | None:
        """What a view made of all samples, in their order; None where it does not look at them, or has no such."""
        view = next((one for one in self.views if one.kind == kind), None)
        if view is None or view.refuses(self.shape) is not None or name not in self._seen[kind].shapes(0):
            return None
        shards = self._seen[kind]
        return torch.cat([shards.column(number, name)[: len(shards.rows(number))] for number in shards.numbers])

    @property
    def evaluations(self) -> float:
        """Denoiser evaluations per sample, the mean."""
        return torch.cat([self._made.column(n, "evaluations") for n in self._made.numbers]).mean().item()

    def pictures(self, count: int) -> Tensor:
        """The first samples, uint8 (count, [F,] C, H, W), as they were kept."""
        return self._read(range(min(count, self.kept, self.source.num)), self.shape)

    def picture_paths(self, count: int) -> list[Path]:
        """Their files."""
        return [self.images / _file(index) for index in range(min(count, self.kept, self.source.num))]

    def _begin(self) -> tuple[Shards, dict[str, Shards]]:
        """The shards of this row, begun where they are not yet."""
        size = BLOCK * -(-self.batch_size // BLOCK)
        folder = self.out / "samples" / self.name
        about = {"format": _FORMAT, "num": self.source.num, "content": self.source.content}
        # Results do not depend on the size of a batch, so a run with another one goes on with the shards as they are.
        size = begun_about(folder).get("shard_size", size)
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            made = Shards.begin(folder, {**about, "shard_size": size}, _MAKER, resume=True, again=_AGAIN)
            seen = {}
            for view in self.views:
                content = {"samples": self.source.content, "view": view.about}
                place = self.out / "features" / view.kind / f"{self.source.name}-{json_sha256(content)[:16]}"
                told = {"format": _SEEN_FORMAT, "num": self.source.num, "shard_size": size, "content": content}
                seen[view.kind] = Shards.begin(place, told, _MAKER, resume=True, again=_AGAIN)
        except OSError as error:
            raise UserError(f"cannot write into {self.out}: {error.strerror}") from error
        return made, seen

    def _forget(self) -> None:
        """Remove what is left of a source that nothing identifies: it may have been another one."""
        for folder in (self.images, self.out / "samples" / self.name):
            shutil.rmtree(folder, ignore_errors=True)
        for view in self.views:
            content = {"samples": None, "view": view.about}
            place = self.out / "features" / view.kind / f"{self.source.name}-{json_sha256(content)[:16]}"
            shutil.rmtree(place, ignore_errors=True)

    def _missing(self) -> list[int]:
        """The chunks that are not complete."""
        return [n for n in self._made.numbers if not self._is_made(n) or self._unseen(n)]

    def _is_made(self, number: int) -> bool:
        return self._made.is_whole(number) and self._kept_right(number)

    def _kept_right(self, number: int) -> bool:
        """Whether the pictures of a chunk are those that were kept."""
        rows = self._made.rows(number)
        digests = self._made.column(number, "digest")
        return all(
            _digest(self.images / _file(index)) == bytes(digest.tolist())
            for index, digest in zip(rows, digests)
            if index < self.kept
        )

    def _unseen(self, number: int) -> list[View]:
        """The views that have not looked at a chunk that is made, and would."""
        shape = self._shape_of(number)
        return [v for v in self.views if v.refuses(shape) is None and not self._seen[v.kind].is_whole(number)]

    def _shape_of(self, number: int) -> tuple[int, ...]:
        """([F,] C, H, W) of the samples of a chunk that is made."""
        first = self._made.column(number, "shape")[0].tolist()
        return tuple(first[1:] if first[0] == 0 else first)

    def _complete(self, number: int, on_samples: Callable[[int], object]) -> None:
        rows = self._made.rows(number)
        if self._is_made(number) and rows.stop <= self.kept:
            images = self._read(rows, self._shape_of(number))
        else:
            images = self._make(number, on_samples)
        asked = self.source.asked(rows)
        for view in self.views:
            if view.refuses(images.shape[1:]) is None and not self._seen[view.kind].is_whole(number):
                self._seen[view.kind].write(number, look(view, images, asked))

    def _make(self, number: int, on_samples: Callable[[int], object]) -> Tensor:
        rows = self._made.rows(number)
        images: list[Tensor] = []
        evaluations: list[float] = []
        batches = -(-len(rows) // self.batch_size)
        for part in range(batches):  # of nearly the same size: a small rest takes nearly as long as a whole batch
            for made in self.source.make(rows[part * len(rows) // batches : (part + 1) * len(rows) // batches]):
                images.append(made.images)
                evaluations += [made.evaluations] * len(made.images)
                on_samples(len(made.images))
        whole = torch.cat(images)
        try:
            digests = [self._keep(index, one) if index < self.kept else bytes(32) for index, one in zip(rows, whole)]
        except OSError as error:
            raise UserError(f"{self.images} could not be written ({error}); make room, and start again") from error
        shape = [0] * (5 - whole.ndim) + list(whole.shape[1:])
        self._made.write(
            number,
            {
                "evaluations": torch.tensor(evaluations, dtype=torch.float64),
                "digest": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
                "shape": torch.tensor(shape).repeat(len(whole), 1),
            },
        )
        return whole

    def _keep(self, index: int, image: Tensor) -> bytes:
        """Write a picture; returns its digest, by which it is known whether all of it came to the disk."""
        stream = io.BytesIO()
        picture = to_pil(image.transpose(0, 1).flatten(1, 2) if image.ndim == 4 else image)
        picture.save(stream, format="PNG", compress_level=_COMPRESSION)
        (self.images / _file(index)).write_bytes(stream.getvalue())
        return hashlib.sha256(stream.getvalue()).digest()

    def _read(self, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Pictures that were kept, uint8 (n, *shape)."""
        found = []
        for index in indices:
            path = self.images / _file(index)
            try:
                with opened(path) as picture:
                    pixels = torch.from_numpy(np.array(picture))
            except UNREADABLE as error:
                raise UserError(f"{path} cannot be read; remove it, and start again") from error
            channels_last = pixels.reshape(*([shape[0]] if len(shape) == 4 else []), *shape[-2:], shape[-3])
            found.append(channels_last.movedim(-1, -3))
        return torch.stack(found)

    def _write_manifest(self) -> None:
        lines = []
        for number in self._made.numbers:
            for index, digest in zip(self._made.rows(number), self._made.column(number, "digest").tolist()):
                if index < self.kept:
                    about = {"index": index, **self.source.describe(index), "file": _file(index)}
                    lines.append(json.dumps({**about, "sha256": bytes(digest).hex()}, ensure_ascii=False))
        try:
            write_text_durably(self.images / "manifest.jsonl", "".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(f"{self.images} could not be written ({error}); make room, and start again") from error


def _file(index: int) -> str:
    return f"{index:06d}.png"


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
