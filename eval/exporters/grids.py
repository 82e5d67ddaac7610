"""Layouts of one grid of pictures for each prompt: DPG-Bench's and OneIG-Bench's."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from fewstep.errors import UserError
from fewstep.eval.exporters.samples import Places, Sample, picture, write_png

_MOST = 4  # pictures of a grid, which is two by two


def dpg(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """DPG-Bench (arXiv 2403.05135): ``ITEM.png``, up to four square pictures of one prompt, row by row.

    Its reader cuts squares of ``--resolution`` at (0, 0), (1, 0), (0, 1), (1, 1), the first ``--pic-num`` of them:
    every prompt has equally many pictures, all of one size. It takes every file of the folder for a picture.
    """
    with _Tiles(folder) as tiles:
        tiles.collect(samples, places)
        width, height = tiles.size()
        if width != height:
            raise UserError(f"DPG-Bench cuts squares out of grids, and these pictures have {width} x {height} pixels")
        counts = {key: len(paths) for key, paths in tiles.paths.items()}
        number = max(counts.values())
        short = [key for key, count in counts.items() if count < number]
        if short:
            lacks = f"{short[0]} has {counts[short[0]]}, others have {number}"
            raise UserError(f"DPG-Bench wants equally many samples of every prompt: {lacks}")
        columns, rows = min(number, 2), 1 if number <= 2 else 2
        for key, paths in tiles.paths.items():
            _grid(paths, columns, rows).save(folder / f"{key}.png")
    command = f"dpg_bench/compute_dpg_bench.py --image-root-path {final} --resolution {width} --pic-num {number}"
    return [command, *places.notes(), *tiles.notes(places)]


def oneig(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """OneIG-Bench (arXiv 2506.07977): ``images/CLASS/MODEL/ID.webp``, one picture or four, two by two, without loss.

    Of a prompt with fewer than four the rest is black, as its own script does it: its readers leave black pictures out.
    """
    with _Tiles(folder) as tiles:
        tiles.collect(samples, places)
        tiles.size()
        side = 1 if max(len(paths) for paths in tiles.paths.values()) == 1 else 2
        for key, paths in tiles.paths.items():
            group, _, name = key.rpartition("/")
            path = folder / "images" / group / model / f"{name}.webp"
            path.parent.mkdir(parents=True, exist_ok=True)
            _grid(paths, side, side).save(path, lossless=True)
    command = f"--image_dirname {final / 'images'} --model_names {model} --image_grid {side}"
    return [command, *places.notes(), *tiles.notes(places)]


class _Tiles:
    """The pictures of grids, on disk until their grid is put together: samples of a prompt may lie far apart.

    paths: of each prompt's pictures by its key, at most four.
    """

    def __init__(self, folder: Path) -> None:
        self._place = folder / ".tiles"
        self.paths: Mapping[str, list[Path]] = {}

    def __enter__(self) -> _Tiles:
        self._place.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place)

    def collect(self, samples: Iterable[Sample], places: Places) -> None:
        """Keep the first four pictures of each prompt; UserError where there is none at all."""
        paths: dict[str, list[Path]] = {}
        for place, (item, number, sample) in enumerate(places.place(samples)):
            if number < _MOST:
                path = self._place / f"{place}.png"
                write_png(sample, path, level=1)
                paths.setdefault(item.key, []).append(path)
        if not paths:
            raise UserError("there is no sample to export")
        self.paths = paths

    def size(self) -> tuple[int, int]:
        """Width and height of all pictures; UserError where they differ."""
        sizes: set[tuple[int, int]] = set()
        for paths in self.paths.values():
            for path in paths:
                with Image.open(path) as image:
                    sizes.add(image.size)
        if len(sizes) > 1:
            (a, b), (c, d), *_ = sorted(sizes)
            raise UserError(f"a grid needs pictures of one size, and these have {a} x {b}, {c} x {d}, ... pixels")
        return sizes.pop()

    @staticmethod
    def notes(places: Places) -> list[str]:
        """What was left out."""
        most = max(places.counts.values())
        return [f"of up to {most} samples of a prompt the first {_MOST} are in its grid"] if most > _MOST else []


def _grid(paths: list[Path], columns: int, rows: int) -> Image.Image:
    """Pictures row by row, black where there is none."""
    images = [picture(Sample(i, None, path)) for i, path in enumerate(paths)]
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
