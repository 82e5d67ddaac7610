"""Real images in a teacher's space on the disk: encoded once, in shards, and read row by row by any number of runs.

A folder is one of :mod:`fewstep.data.shards`. Row i holds ``x0``; a shard also holds what its images show, so that a
run needs nothing else of them: ``captions`` and ``texts`` of :class:`.RealImages`, as numbers or packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.contents import Contents, all_of, contents_of
from fewstep.data.fingerprint import part_digest
from fewstep.data.images import RealImages, image_contents, image_size, read_images
from fewstep.data.packed_texts import pack, unpack
from fewstep.data.read_ahead import ReadAhead
from fewstep.data.shards import Shards, begun_about, read_about
from fewstep.errors import UserError, one_line
from fewstep.recording import Recording
from fewstep.recording.pipeline import find_decoder

FORMAT = "fewstep-latents-1"
MAKER = "fewstep cache --data"
_AHEAD = 32  # images that are read while one is encoded
_NAMED = 5  # of the images that cannot be read


class Latents:
    """A complete folder of encoded images, in the place of :class:`fewstep.data.images.RealImages`.

    Args:
        folder: that ``fewstep cache --data`` made.

    Attributes:
        captions: a text or a label for each, None where the data says nothing.
        texts: for a teacher of prompts, in the place of ``captions``.
        classes: the names of all class folders, in the order of their numbers.

    Raises:
        UserError: it is not complete, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.shards = Shards(folder, read_about(folder, FORMAT, MAKER), MAKER)
        about = self.shards.about
        for number in self.shards.numbers:
            if not self.shards.path(number).exists():
                raise UserError(f"{folder} is not complete; go on with it by {MAKER} ... --resume")
        self.captions = _Shown(self.shards, "captions", about["captions"]) if about["captions"] else None
        self.texts = _Shown(self.shards, "texts", "text") if about["texts"] else None
        self.classes: tuple[str, ...] = tuple(about["classes"])

    def __len__(self) -> int:
        return self.shards.count

    def refuse_other_teacher(self, recording: Recording) -> None:
        """Raise :class:`UserError` where they are in another space than a teacher's, and say in which way."""
        mine = space_of(recording)
        theirs = self.shards.about["space"]
        if changed := sorted(name for name in mine if theirs.get(name) != mine[name]):
            raise UserError(
                f"the latents in {self.shards.folder} are of another teacher: its {', '.join(changed)} "
                f"{'differs' if len(changed) == 1 else 'differ'}; make others by {MAKER}"
            )

    def x0(self, row: int) -> Tensor:
        """One image in the network's space, float32 on the CPU."""
        return self.shards.tensor(row, "x0").float()


class _Shown(Sequence[Any]):
    """What the images of all shards show, read when it is asked for."""

    def __init__(self, shards: Shards, name: str, kind: str) -> None:
        self._shards, self._name, self._kind = shards, name, kind

    def __len__(self) -> int:
        return self._shards.count

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        shard, place = divmod(number, self._shards.about["shard_size"])
        return self._of(shard)[place]

    def __iter__(self) -> Iterator[Any]:
        for shard in self._shards.numbers:
            yield from self._of(shard)

    def _of(self, shard: int) -> list[Any]:
        content = self._shards.column(shard, self._name)
        if self._kind == "label":
            return content.tolist()
        return [text[:-1] for text in unpack(self._shards.column(shard, f"{self._name}_ends"), content)]


def read_data(
    source: str, text: str | None = None, index: Path | None = None, *, progress: bool = False
) -> RealImages | Latents:
    """What ``--data`` names: images (:func:`fewstep.data.images.read_images`), or such that are encoded already."""
    if begun_about(Path(source)).get("format") == FORMAT:
        return Latents(Path(source))
    return read_images(source, text, index, progress=progress)


def refuse_unusable(data: RealImages | Latents, progress: bool = False) -> None:
    """Read what a run reads once, so that nothing stops it in its middle: all, or of large sets of images some.

    Raises:
        UserError: an image cannot be read, or a shard of latents is damaged; they are named.
    """
    if isinstance(data, Latents):
        Shards.find(data.shards.folder, FORMAT, MAKER)
    else:
        data.refuse_unreadable(progress)


def data_contents(data: RealImages | Latents, source: str, known: Contents | None = None) -> Contents:
    """The digests of images or latents and of what they show, see :func:`fewstep.data.contents.contents_of`.

    Args:
        data: that :func:`read_data` found.
        source: where.
        known: what was found earlier.
    """
    if isinstance(data, RealImages):
        return image_contents(data, source, known)
    files = [data.shards.path(number) for number in data.shards.numbers]
    return contents_of(Path(source), files, known)


def space_of(recording: Recording) -> dict[str, Any]:
    """What decides how an image lies in a teacher's space."""
    decoder = find_decoder(recording.pipeline)
    return {
        "encoder": None if decoder is None else part_digest(getattr(recording.pipeline, decoder)),
        "map": recording.codec.describe(),
        "size": list(image_size(recording)),
        "shape": list(recording.sample_shape),
    }


class LatentMaker:
    """Encodes a set of images into a folder, alone or with other processes.

    Args:
        folder: of the latents.
        recording: of the teacher.
        images: to be encoded, each alone.
        source: where they lie.
        shard_size: images in one file, which is also what is lost when a process is killed.
        dtype: of what is stored: float32, float16 or bfloat16.
        resume: go on with what is there.

    Raises:
        UserError: the folder is in use, or holds something else.
    """

    def __init__(
        self,
        folder: Path,
        recording: Recording,
        images: RealImages,
        source: str,
        *,
        shard_size: int,
        dtype: str,
        resume: bool,
    ) -> None:
        self.images, self.recording, self.dtype = images, recording, dtype
        captions = images.captions if images.captions is not images.texts else None
        about = {
            "format": FORMAT,
            "num": len(images),
            "shard_size": shard_size,
            "dtype": dtype,
            "space": space_of(recording),
            "images": all_of(image_contents(images, source)),
            "captions": None if captions is None else "label" if isinstance(captions[0], int) else "text",
            "texts": images.texts is not None,
            "classes": list(images.classes),
        }
        self._captions = captions
        self.shards = Shards.begin(folder, about, MAKER, resume=resume)

    def run(
        self, rank: int = 0, world: int = 1, *, workers: int = 0, on_rows: Callable[[int], object] = lambda n: None
    ) -> None:
        """Make this process's shards, every ``world``-th; what is whole already is left as it is.

        Args:
            rank: of this process, from 0.
            world: how many processes share the work.
            workers: threads that read images.
            on_rows: called with the number of images whenever some are done.

        Raises:
            UserError: images cannot be read, which are named once all others are done; or the disk is full.
        """
        size = image_size(self.recording)
        reader = ReadAhead(lambda row: self.images.image(row, *size), workers)
        bad: list[str] = []
        for number in self.shards.numbers[rank::world]:
            rows = self.shards.rows(number)
            before = len(bad)
            if not self.shards.is_whole(number):
                x0 = []
                for row in rows:
                    reader.announce(range(row, min(row + _AHEAD, rows.stop)))
                    try:
                        (pixels,) = reader.take([row])
                    except UserError as error:
                        bad.append(one_line(error))
                        continue
                    x0.append(self.recording.encode(pixels[None].float() / 255).cpu())
                if len(bad) == before:
                    self.shards.write(number, {"x0": torch.cat(x0).to(getattr(torch, self.dtype)), **self._shown(rows)})
            on_rows(len(rows))
        if bad:
            more = ", ..." if len(bad) > _NAMED else ""
            raise UserError(f"{len(bad):,} images cannot be encoded: {', '.join(bad[:_NAMED])}{more}")

    def _shown(self, rows: range) -> dict[str, Tensor]:
        """What the images of a shard show, as tensors with as many rows or more."""
        tensors: dict[str, Tensor] = {}
        for name, shown in (("captions", self._captions), ("texts", self.images.texts)):
            if shown is None:
                continue
            values: list[Any] = [shown[row] for row in rows]
            if isinstance(values[0], int):
                tensors[name] = torch.tensor(values)
            else:
                tensors[f"{name}_ends"], tensors[name] = pack(f"{value}\n" for value in values)
        return tensors
