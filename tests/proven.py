"""Proofs of teachers, once for equal pipelines: hundreds of tiny runs start from few, and a third of each is its proof.

What opening a teacher proves is a function of the pipeline's classes, configurations and weights and of its call. Where
all are as they were in an earlier test of the process, the earlier proof stands, and its warnings are given again. A
proof that fails is never kept. Tests of the proof itself ask a recording for it, and get a new one.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from fewstep.recording import Recording, record
from fewstep.recording.proof.proof import Proof

_PROOFS: dict[str, tuple[Proof, list[warnings.WarningMessage]]] = {}


def proven_once(pipeline: Any, **call: Any) -> Recording:
    """In the place of ``record`` in ``fewstep.programs.teacher``: a recording that takes up the proof of its equal."""
    recording = record(pipeline, **call)
    key = _key(recording)

    def prove(seed: int = 0) -> Proof:
        if key is None or seed != 0:
            return Recording.prove(recording, seed)
        if key not in _PROOFS:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _PROOFS[key] = Recording.prove(recording, seed), caught
        proof, told = _PROOFS[key]
        for warning in told:
            warnings.warn(warning.message, warning.category, stacklevel=2)
        object.__setattr__(recording, "proof", proof)
        return proof

    object.__setattr__(recording, "prove", prove)
    return recording


def _key(recording: Recording) -> str | None:
    """A digest of all that a proof depends on; None where a weight is no ordinary tensor of the host."""
    digest = hashlib.sha256()
    pipeline = recording.pipeline
    parts = {"": pipeline, **pipeline.components}
    asked = recording.invocation.item, recording.call, recording.off, str(recording.dtype)
    digest.update(repr(asked).encode())
    for name, part in parts.items():
        config = _told(part.config) if isinstance(part, ConfigMixin) else None
        digest.update(repr((name, type(part).__module__, type(part).__qualname__, config)).encode())
        if not isinstance(part, nn.Module):
            continue
        for key, value in (*part.named_parameters(), *part.named_buffers()):
            if type(value) not in (torch.Tensor, nn.Parameter) or value.device.type != "cpu":
                return None
            digest.update(repr((key, value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _told(config: Mapping[str, Any]) -> str:
    """A configuration as text, without what it says of how it came about: in memory, or from which folder."""
    told = {name: value for name, value in config.items() if not name.startswith("_")}
    return json.dumps(told, sort_keys=True, default=str)
