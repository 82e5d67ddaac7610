"""A whole pipeline in one ``.safetensors`` file, converted by diffusers' own loader with a configuration from here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import UserError, first_line
from fewstep.teachers.source import CONFIGURATION, Source
from fewstep.teachers.weights import WeightsError, left_out


def load_single_file(file: Path, *, dtype: torch.dtype, flag: str = "--teacher", **parts: Any) -> DiffusionPipeline:
    """The pipeline of a single file; nothing is fetched.

    Args:
        file: in the format in which such models are traded, with all networks of the pipeline.
        dtype: of its weights.
        flag: which setting named it, for messages.
        parts: of the pipeline that are there already.

    Raises:
        UserError: its configuration is not on this machine, diffusers does not convert such files, or it lacks a part.
    """
    configuration = configuration_of(file, flag)
    kind = getattr(diffusers, str(DiffusionPipeline.load_config(configuration)["_class_name"]), None)
    if kind is None or not hasattr(kind, "from_single_file"):
        raise UserError(f"{flag} {file}: diffusers reads no {getattr(kind, '__name__', 'such pipeline')} from one file")
    # In the file's own precision first: what is missing has no storage, and cannot be cast.
    try:
        pipeline = kind.from_single_file(str(file), config=str(configuration), local_files_only=True, **parts)
    except NotImplementedError as error:  # diffusers moves a network with such weights, and does not say which
        raise WeightsError(f"it lacks weights of a network that its configuration in {configuration} has") from error
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        if missing := left_out(network):
            raise WeightsError(f"it does not hold the whole {name}: {missing[0]} is missing, of {len(missing)} weights")
    return pipeline.to(dtype)


def index_of(source: Source) -> dict[str, Any]:
    """The content of a pipeline's model_index.json, or of that of a single file's configuration.

    Raises:
        OSError, ValueError: it cannot be read; UserError: the configuration is not on this machine.
    """
    return Source(configuration_of(Path(source.place))).index() if source.is_file else source.index()


def configuration_of(file: Path, flag: str = "--teacher") -> Path:
    """A folder with the configuration of a single file: the one it lies in, else what diffusers names, fetched before.

    Raises:
        UserError: it is not on this machine, or the file is none.
    """
    if (file.parent / "model_index.json").is_file():
        return file.parent
    repository = _repository_of(file, flag)
    try:
        return Path(
            snapshot_download(repository, local_files_only=True, allow_patterns=[f"*{end}" for end in CONFIGURATION])
        )
    except Exception as error:  # of the hub's client
        load = f'getattr(diffusers, diffusers.DiffusionPipeline.load_config("{repository}")["_class_name"])'
        convert = f'kind.from_single_file({str(file)!r}, config="{repository}").save_pretrained("FOLDER")'
        raise UserError(
            f"{flag} {file} is a single file, and its configuration, that of {repository}, is not on this machine: put "
            f"a model_index.json with its folders beside the file, or convert it once, with a connection, and give the "
            f"folder: import diffusers; kind = {load}; {convert}"
        ) from error


def _repository_of(file: Path, flag: str) -> str:
    """What diffusers takes the configuration of such a file from; by its keys and shapes alone."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag} {file} cannot be read: {first_line(error)}") from error
    keys: dict[str, Tensor] = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return str(fetch_diffusers_config(keys)["pretrained_model_name_or_path"])
