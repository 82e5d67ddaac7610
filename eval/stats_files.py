"""Mean and covariance of features in a ``.npz``: the layout that EDM and clean-fid read, with what they leave unsaid.

``mu`` float64 (d,) and ``sigma`` float64 (d, d) are theirs; ``n``, ``extractor``, ``weights_sha256`` and ``resize`` are
further entries, which they pass over. Nothing is unpickled, and no more is read than a covariance may be long.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.durable import write_durably
from fewstep.errors import UserError, one_line

_WIDEST = 8192  # features: four times Inception's
_MOST_BYTES = 8 * _WIDEST**2 + 1024
# Of the largest entry: what rounding and float32 leave of a symmetric matrix.
_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class FeatureStatistics:
    """What a Fréchet distance needs of a set of images, and of which images and features it is.

    mean: float64 (d,); covariance: float64 (d, d), unbiased. num: images, extractor: its name, weights_sha256: of its
    weights, resize: in words; None where a file does not say.
    """

    mean: Tensor
    covariance: Tensor
    num: int | None = None
    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None


def write_stats(path: Path, statistics: FeatureStatistics) -> None:
    """Write statistics as a ``.npz``, complete or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    entries: dict[str, Any] = {
        "mu": statistics.mean.double().cpu().numpy(),
        "sigma": statistics.covariance.double().cpu().numpy(),
    }
    said = {
        "n": statistics.num,
        "extractor": statistics.extractor,
        "weights_sha256": statistics.weights_sha256,
        "resize": statistics.resize,
    }
    entries |= {name: np.asarray(value) for name, value in said.items() if value is not None}

    def save(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            np.savez(file, **entries)

    write_durably(path, save)


def read_stats(path: Path) -> FeatureStatistics:
    """Statistics of a ``.npz`` of ours, of EDM's, of clean-fid's or of ADM's (whose images are left unread).

    Raises:
        UserError: it cannot be read, is no such file, or its numbers are no mean and covariance.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name[:-4] for name in archive.namelist() if name.endswith(".npy")}
            lacking = [name for name in ("mu", "sigma") if name not in names]
            if lacking:
                raise UserError(f"{path} has no {' and no '.join(lacking)}: statistics are mu (d,) and sigma (d, d)")
            mean, covariance = (_numbers(_read(archive, name), name) for name in ("mu", "sigma"))
            num = _read(archive, "n") if "n" in names else None
            said: dict[str, str] = {
                name: _word(_read(archive, name), name)
                for name in ("extractor", "weights_sha256", "resize")
                if name in names
            }
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is no file of statistics (.npz with mu and sigma): {one_line(error)}") from error
    _refuse_nonsense(path, mean, covariance)
    if num is not None and (num.shape != () or num.dtype.kind not in "iu" or num < 1):
        raise UserError(f"{path} says no number of images: its n is {str(num)[:40]}")
    return FeatureStatistics(
        torch.from_numpy(mean),
        torch.from_numpy((covariance + covariance.T) / 2),
        None if num is None else int(num),
        said.get("extractor"),
        said.get("weights_sha256"),
        said.get("resize"),
    )


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an archive, when it is as long as its own shape says, and no longer than a covariance may be."""
    with archive.open(f"{name}.npy") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"its {name} is too large")
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"its {name} is damaged")
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind != "f":
        raise ValueError(f"its {name} is of {values.dtype}")
    return values.astype(np.float64)


def _word(value: np.ndarray, name: str) -> str:
    if value.shape != () or value.dtype.kind != "U":
        raise ValueError(f"its {name} is no text")
    return str(value)


def _refuse_nonsense(path: Path, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Raise UserError for what cannot be a mean and a covariance."""
    size = mean.size
    if mean.shape != (size,) or size < 1 or covariance.shape != (size, size):
        raise UserError(f"{path}: mu is {mean.shape} and sigma {covariance.shape}, where (d,) and (d, d) belong")
    if not np.isfinite(mean).all() or not np.isfinite(covariance).all():
        raise UserError(f"{path} has numbers that are not finite")
    largest = np.abs(covariance).max()
    if (np.diagonal(covariance) < 0).any() or (np.abs(covariance - covariance.T) > _ASYMMETRY * largest).any():
        raise UserError(f"{path}: sigma is no covariance: it is not symmetric, or has a negative variance")
