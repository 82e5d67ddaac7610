"""In which precision a trained network is written: the one that was asked for, else the one of the teacher's files."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.export.errors import ExportError
from fewstep.export.part_files import stored_dtypes
from fewstep.recording import Recording

#: What ``--export_dtype`` takes.
EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def as_written(
    recording: Recording, networks: Mapping[str, nn.Module], export_dtype: str | None
) -> dict[str, nn.Module]:
    """The trained networks in the dtypes of their files; one that has them already is given back itself.

    Args:
        recording: of the student's pipeline, with the teacher's networks.
        networks: the student's, by component.
        export_dtype: one of :data:`EXPORT_DTYPES`; None: that of each tensor in the teacher's files, or in memory where
            the teacher comes from no folder.

    Raises:
        ExportError: a trained number is too large for the dtype.
    """
    common = _dtypes_of(recording, recording.component)
    written = {}
    for name, network in networks.items():
        known = _dtypes_of(recording, name) if name in recording.networks else common
        usual = Counter(known.values()).most_common(1)[0][0]
        asked = None if export_dtype is None else EXPORT_DTYPES[export_dtype]
        dtypes = {key: asked or known.get(key, usual) for key in network.state_dict()}
        written[name] = _refuse_infinite(_cast(network, dtypes), network, name)
    return written


def as_computed(recording: Recording, written: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Written networks in the dtypes that the teacher's have in memory: what a load of the files gives."""
    computed, usual = {}, recording.dtype
    for name, network in written.items():
        teacher = recording.networks.get(name)
        dtypes = {} if teacher is None else {key: value.dtype for key, value in teacher.state_dict().items()}
        computed[name] = _cast(network, {key: dtypes.get(key, usual) for key in network.state_dict()})
    return computed


def _dtypes_of(recording: Recording, name: str) -> dict[str, torch.dtype]:
    """The dtypes of a teacher's network by the names of its floating tensors: in its files, else in memory."""
    stored = stored_dtypes(recording.pipeline, name)
    if stored:
        return stored
    state = recording.networks[name].state_dict()
    return {key: value.dtype for key, value in state.items() if value.is_floating_point()}


def _cast(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """A copy of a network whose floating tensors have these dtypes; the network itself where they have them."""
    state = {key: value for key, value in network.state_dict(keep_vars=True).items() if value.is_floating_point()}
    if all(value.dtype == dtypes[key] for key, value in state.items()):
        return network
    # The copy takes these in place of the originals, which so are never in memory twice.
    replaced: dict[int, Tensor] = {}
    for key, value in state.items():
        cast = value.detach().to(dtypes[key], copy=True)
        trains = value.requires_grad
        replaced[id(value)] = nn.Parameter(cast, requires_grad=trains) if isinstance(value, nn.Parameter) else cast
    return copy.deepcopy(network, replaced)


def _refuse_infinite(written: nn.Module, network: nn.Module, name: str) -> nn.Module:
    """The written network, if every number that was finite still is."""
    before = network.state_dict()
    for key, value in written.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all() and before[key].isfinite().all():
            dtype = str(value.dtype).removeprefix("torch.")
            raise ExportError(
                f"{name} has numbers in {key} that {dtype} cannot hold: give --export_dtype bfloat16 or float32"
            )
    return written
