"""Weights of the networks that judge images: where they lie on this machine, and whether they are what was published.

Nothing is ever fetched, and no network ever judges with random weights: a file that is not there is an error whose one
sentence says where to put it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.data.durable import file_sha256
from fewstep.errors import UserError, one_line

#: The environment variable that names a folder of weights.
VARIABLE = "FEWSTEP_WEIGHTS"
_HASH = re.compile(r"[0-9a-f]{64}")
_SHOWN = 3  # names of parameters that an error quotes


class MissingWeightsError(UserError):
    """A file of weights is nowhere on this machine; the one plain sentence names it and says where to put it."""


@dataclass(frozen=True)
class WeightFile:
    """A file of weights that somebody published.

    name: its path below a folder of weights: ``inception-2015-12-05.pt``, or ``dinov2-large/model.safetensors``.
    about: what it is, in words. sha256: the published hash of its content, 64 hexadecimal digits. size: in bytes.
    hub: the repository ``owner/name`` that has a file of the last part of ``name``.
    """

    name: str
    about: str
    sha256: str | None = None
    size: int | None = None
    hub: str | None = None


@dataclass(frozen=True)
class Found:
    """A file of weights on this machine. verified: its SHA-256 is a published one, not merely what the user told."""

    path: Path
    sha256: str
    verified: bool


@dataclass(frozen=True)
class Weights:
    """Where files of weights are looked for: in ``folder``, in that which $FEWSTEP_WEIGHTS names, in the hub's cache.

    folder: of ``--weights``. told: SHA-256 by a file's name (``--weights_sha256``): what the user vouches for, instead
    of the published hash where both are there.

    Raises:
        UserError: a folder that is none, or a hash that is none.
    """

    folder: Path | None = None
    told: Mapping[str, str] = field(default_factory=dict)
    _known: dict[WeightFile, Found] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._folders()
        for name, digest in self.told.items():
            if not _HASH.fullmatch(digest.lower()):
                raise UserError(f"--weights_sha256 of {name} must be 64 hexadecimal digits, not {digest!r}")

    def find(self, file: WeightFile) -> Found:
        """A file of weights whose content is the published one, or the one that was told; without a network.

        Raises:
            MissingWeightsError: it is nowhere.
            UserError: it is another file than was published or told, or nobody said which it has to be.
        """
        if file not in self._known:
            self._known[file] = self._checked(file)
        return self._known[file]

    def _folders(self) -> list[Path]:
        """The folders in the order in which they are searched."""
        named = {"--weights": self.folder, f"${VARIABLE}": os.environ.get(VARIABLE) or None}
        folders = {name: Path(place) for name, place in named.items() if place is not None}
        for name, place in folders.items():
            if not place.is_dir():
                raise UserError(f"{name} is no folder: {place}")
        return list(folders.values())

    def _checked(self, file: WeightFile) -> Found:
        path, published = self._look_up(file)
        expected = self.told.get(file.name, published)
        if expected is None:
            raise UserError(
                f"no hash of {file.name} was published: to trust {path}, give its SHA-256 by "
                f"--weights_sha256 {file.name}=HEX"
            )
        try:
            size = path.stat().st_size
            # Before half of a large file is read: what a broken download leaves.
            whole = file.size is None or size == file.size or file.name in self.told
            digest = file_sha256(path) if whole else None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        if digest is None:
            raise UserError(f"{path} is damaged: it has {size} bytes, not {file.size}; put {file.name} there once more")
        if digest != expected.lower():
            whose = "told by --weights_sha256" if file.name in self.told else "published"
            raise UserError(f"{path} is damaged or another file: its SHA-256 is {digest}, not {expected} as {whose}")
        return Found(path, digest, digest == published)

    def _look_up(self, file: WeightFile) -> tuple[Path, str | None]:
        """Where a file lies, and its published hash."""
        for folder in self._folders():
            if (path := folder / file.name).is_file():
                return path, file.sha256
        if file.hub is not None:
            from huggingface_hub import try_to_load_from_cache

            cached = try_to_load_from_cache(file.hub, PurePosixPath(file.name).name)
            if isinstance(cached, str):
                # The cache keeps a large file under the SHA-256 that its repository gave for it.
                blob = Path(cached).resolve().name
                return Path(cached), file.sha256 or (blob if _HASH.fullmatch(blob) else None)
        raise MissingWeightsError(self._missing(file))

    def _missing(self, file: WeightFile) -> str:
        size = f", {file.size / 2**20:.0f} MiB" if file.size is not None else ""
        cached = ""
        if file.hub is not None:
            cached = f", or fetch it by `hf download {file.hub} {PurePosixPath(file.name).name}`"
        return (
            f"{file.name} is missing ({file.about}{size}): put it into the folder of --weights or ${VARIABLE} "
            f"under this name{cached}"
        )


def read_state(found: Found) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of torch's own format, by their names; no code of the file is run.

    Raises:
        UserError: it is neither, or holds something else than tensors by names.
    """
    try:
        if found.path.suffix == ".safetensors":
            return load_file(found.path)
        state = torch.load(found.path, map_location="cpu", weights_only=True)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]  # a checkpoint, which says more than its weights
    except (OSError, SafetensorError) as error:
        raise UserError(f"{found.path} cannot be read: {one_line(error)}") from error
    except Exception as error:  # torch raises what its unpickler met: RuntimeError, EOFError, KeyError, ...
        raise UserError(f"{found.path} is no file of weights: {one_line(error)[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{found.path} holds something else than tensors by their names")
    return state


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A network with these tensors as its parameters and buffers, for inference: same names and shapes, nothing over.

    Args:
        network: of any device, also ``meta``; its dtypes stay.
        state: tensors by name.
        path: of their file, for errors.

    Raises:
        UserError: a name is missing, one is unknown, or a shape differs.
    """
    wanted = network.state_dict()
    refuse_misfits(state, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, path, type(network).__name__)
    network.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in wanted.items()}, assign=True)
    return network.eval().requires_grad_(False)


def refuse_misfits(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path, network: str
) -> None:
    """Raise UserError unless tensors have these names and shapes, all of them and no others."""
    misshapen = [
        f"{name} is {_size(tuple(state[name].shape))}, not {_size(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    differences = (
        ("it lacks ", shapes.keys() - state.keys()),
        ("it has also ", state.keys() - shapes.keys()),
        ("", misshapen),
    )
    for words, names in differences:
        if names:
            rest = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
            raise UserError(f"{path} does not fit {network}: {words}{', '.join(sorted(names)[:_SHOWN])}{rest}")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
