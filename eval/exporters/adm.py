"""ADM's suite: all pictures in one array of an ``.npz``, written as they come."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fewstep.errors import UserError
from fewstep.eval.exporters.samples import Places, Sample, picture


def adm(samples: Iterable[Sample], folder: Path, places: Places, final: Path, model: str) -> list[str]:
    """The samples of guided-diffusion's evaluator (arXiv 2105.05233): ``arr_0``, uint8 (N, H, W, 3), not compressed.

    One picture is in memory at a time; for a while the pixels are on disk twice.

    Raises:
        UserError: there is no sample, or one of another size.
    """
    pixels, shape, count = folder / "pixels", None, 0
    with pixels.open("wb") as file:
        for sample in samples:
            array = np.asarray(picture(sample), dtype=np.uint8)
            shape = shape or array.shape
            if array.shape != shape:
                sizes = f"{array.shape[1]} x {array.shape[0]} pixels, not {shape[1]} x {shape[0]}"
                raise UserError(f"ADM's samples have one size: sample {sample.index} has {sizes}")
            file.write(array.tobytes())
            count += 1
    if shape is None:
        raise UserError("there is no sample to export")
    name = f"samples_{'x'.join(map(str, (count, *shape)))}.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    with (
        zipfile.ZipFile(folder / name, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as entry,
        pixels.open("rb") as file,
    ):
        np.lib.format.write_array_header_1_0(entry, header)
        shutil.copyfileobj(file, entry)
    pixels.unlink()
    return [f"evaluations/evaluator.py REFERENCE.npz {final / name}"]
