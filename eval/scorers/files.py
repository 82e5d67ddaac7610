"""Published files of scorers: the first of several that is there, and the tensors of CLIP's various formats."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.errors import UserError, one_line
from fewstep.eval.weights import Found, MissingWeightsError, WeightFile, Weights, read_state


def read_clip(found: Found) -> dict[str, Tensor]:
    """The tensors of a CLIP file by their names; of OpenAI's TorchScript too, whose hash was checked when it was found.

    Raises:
        UserError: it cannot be read, or holds no tensors by names.
    """
    if not _is_torchscript(found):
        return read_state(found)
    try:
        return dict(torch.jit.load(found.path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise UserError(f"{found.path} is no file of weights: {one_line(error)[:200]}") from error


def first_found(weights: Weights, files: Sequence[WeightFile]) -> Found:
    """The first of several files of the same content that is there.

    Raises:
        MissingWeightsError: none is; one sentence that names all.
        UserError: one that is there is not what was published.
    """
    missing: list[str] = []
    for file in files:
        try:
            return weights.find(file)
        except MissingWeightsError as error:
            missing.append(str(error))
    others = " or ".join(file.name for file in files[1:])
    raise MissingWeightsError(missing[0] + (f"; {others} will do as well" if others else ""))


def _is_torchscript(found: Found) -> bool:
    """Whether a file is an archive with code, which ``torch.load`` does not read."""
    try:
        with zipfile.ZipFile(found.path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
