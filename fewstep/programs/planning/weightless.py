"""Weightless pipelines: a teacher built from its configuration files alone, with networks that hold no weights.

Their weights are fake tensors, which have a shape and a dtype and take no memory. What such a network answers is drawn
(:mod:`fewstep.programs.planning.drawn`), so that the pipeline's own call runs, on real tokens, latents and times, and
the recorder learns from it how the network is called. It can prove nothing.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fewstep.errors import UserError, first_line
from fewstep.reading import read_json
from fewstep.teachers.single_file import configuration_of
from fewstep.teachers.source import CONFIGURATION, find_source


class _FakeTensors(FakeTensorMode):
    """What is worked out from numbers alone, masks and lengths, stays real: networks and pipelines decide by it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        real = tensors and not any(isinstance(value, FakeTensor) for value in tensors)
        if real and (function in _READS or not any(value.is_floating_point() for value in tensors)):
            return function(*args, **(kwargs or {}))
        answer: Any = super().__torch_dispatch__(function, types, args, kwargs)
        if function.overloadpacket is torch.ops.aten.arange and not answer.is_floating_point():
            return function(*args, **(kwargs or {}))  # places, by which encoders of pictures put them in windows
        return answer


#: Operations by which the host reads a tensor.
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


def fake_tensors() -> FakeTensorMode:
    """The mode in which tensors have no storage; real ones that meet them (tables of a schedule) count as fake."""
    return _FakeTensors(allow_non_fake_inputs=True)


def weightless_teacher(
    name: str, mode: FakeTensorMode, revision: str | None = None, subfolder: str | None = None
) -> DiffusionPipeline:
    """The float32 pipeline of a teacher without its weights; of a hub id, only configuration files are fetched.

    Args:
        name: a folder, which needs no weights in it, a single file, a hub id, or an embedded teacher.
        mode: of the networks' weights.
        revision: of the hub id.
        subfolder: where in the folder or repository the pipeline lies.

    Raises:
        UserError: there is no such thing, it is not a pipeline, or it cannot be built from configuration files.
    """
    folder = _configuration_folder(name, revision, subfolder)
    try:
        index = dict(read_json(folder / "model_index.json"))
        parts = {
            part: None if entry[0] is None else _part(_class_of(*entry), folder / part, mode)
            for part, entry in index.items()
            if isinstance(entry, list)
        }
        settings = {key: value for key, value in index.items() if key not in parts and not key.startswith("_")}
        pipeline = _class_of("diffusers", index["_class_name"])(**parts, **settings)
    except Exception as error:  # each library that reads a part of the folder has exceptions of its own
        raise UserError(f"{name} cannot be built from its configuration files: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def fake_world(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, every new tensor is fake, and modules of fake ones can be copied, moved and cast."""
    # oneDNN's kernels have formats of their own, which no fake tensor can take.
    with movable(), mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@contextmanager
def movable() -> Iterator[None]:
    """Inside, modules of fake tensors can be copied, moved and cast: some pipelines cast their autoencoder."""
    module: Any = nn.Module  # types are not made for methods that are exchanged for a while
    fake: Any = FakeTensor
    before = module._apply, vars(fake).get("__deepcopy__", Tensor.__deepcopy__)
    module._apply, fake.__deepcopy__ = _converted, _copied
    try:
        yield
    finally:
        module._apply, fake.__deepcopy__ = before


def pretend(module: nn.Module, mode: FakeTensorMode) -> None:
    """Make the weights of a module fake that was made outside."""
    _converted(module, lambda tensor: tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor))


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """As ``Tensor.__deepcopy__``, which reads the storage that a fake tensor does not have."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if parameter else copied
    return memo[id(tensor)]


def _converted(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As ``nn.Module._apply``, which swaps fake parameters in place and cannot, because their mode refers to them."""
    for child in module.children() if recurse else ():
        _converted(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None and (changed := change(weights := parameter.detach())) is not weights:
            module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _configuration_folder(name: str, revision: str | None, subfolder: str | None) -> Path:
    source = find_source(name, revision=revision, subfolder=subfolder, flag="teacher", weights=False)
    if source.is_file:
        return configuration_of(Path(source.place), "teacher")
    if isinstance(source.place, Path):
        return source.place
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[f"*{end}" for end in CONFIGURATION]))
    except Exception as error:  # of the hub, of its client, or of the connection
        raise UserError(f"the configuration of {name} cannot be fetched: {first_line(error)}") from error
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{name} is not a diffusers pipeline: it has no model_index.json")
    return folder


def _class_of(library: str, name: str) -> Any:
    """The class of a part, as model_index.json names it; some stand in a pipeline's own module."""
    if library in _LIBRARIES:
        return getattr(importlib.import_module(library), name)
    # To import any module that a file names would be to run it.
    return getattr(getattr(importlib.import_module("diffusers.pipelines"), library), name)


#: The libraries that a part's class may come from, beside diffusers' own pipelines.
_LIBRARIES = ("diffusers", "transformers")


def _part(kind: Any, folder: Path, mode: FakeTensorMode) -> Any:
    """A network of fake weights, or whatever else a pipeline consists of, from its own files.

    `kind`: a class of diffusers or transformers, with the class methods that those have.
    """
    is_network, of_diffusers = issubclass(kind, nn.Module), issubclass(kind, ConfigMixin)
    if not is_network:
        return kind.from_pretrained(folder)
    with fake_world(mode):
        if of_diffusers:
            network = kind.from_config(kind.load_config(folder)).eval()
        else:
            # Some make their parts in the dtype that their configuration names.
            network = kind(kind.config_class.from_pretrained(folder)).eval().float()
    for name, buffer in network.named_buffers(recurse=False):
        if buffer.is_floating_point():
            # Pipelines themselves read such numbers of a network: an autoencoder's mean and deviation of each channel.
            setattr(network, name, torch.ones(buffer.shape, dtype=buffer.dtype))
    return network
