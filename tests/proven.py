"""Teachers recorded and proven once for equal pipelines: hundreds of tiny runs start from few, a third of each is that.

What opening a teacher records and proves is a function of the pipeline's classes, configurations and weights and of its
call. Where all are as they were in an earlier test of the process, the earlier recording is taken up with the networks
of this pipeline, the earlier proof stands, and its warnings are given again. What fails is never kept. Items are
recorded each time. Tests of the recording itself call ``record``, and those of the proof ask a recording for it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fewstep.conditioning.item import Item
from fewstep.recording import Recording, record
from fewstep.recording.loop.experts import Expert
from fewstep.recording.proof.proof import Proof

_RECORDINGS: dict[Any, Recording] = {}
_PROOFS: dict[Any, tuple[Proof, list[warnings.WarningMessage]]] = {}


def proven_once(pipeline: Any, items: Any = None, **call: Any) -> Recording:
    """In the place of ``record`` in ``fewstep.programs.teacher``: a recording that takes up what is known of an equal.

    Args:
        pipeline: of the teacher.
        items: as of ``record``.
        call: of the pipeline.
    """
    recording = record(pipeline, items=items, **call) if items is not None else _recorded_once(pipeline, call)
    asked = recording.invocation
    samples = [one.key if isinstance(one, Item) else one for one in (asked.item, asked.other)]
    key = _key(pipeline, samples, recording.call, recording.off)

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


def _recorded_once(pipeline: Any, call: dict[str, Any]) -> Recording:
    key = _key(pipeline, call) if isinstance(pipeline, DiffusionPipeline) else None
    if key is None:
        return record(pipeline, **call)
    if key not in _RECORDINGS:
        # Kept without the pipeline, which a test may change, or have in gigabytes.
        recording = record(pipeline, **call)
        _RECORDINGS[key] = replace(recording, pipeline=None, network=None, experts=_with(recording, {}))
        return recording
    known = _RECORDINGS[key]
    experts = _with(known, pipeline.components)
    return replace(known, pipeline=pipeline, network=experts[0].network, experts=experts)


def _with(recording: Recording, networks: Mapping[str, Any]) -> tuple[Expert, ...]:
    return tuple(replace(expert, network=networks.get(expert.component)) for expert in recording.experts)


def _key(pipeline: Any, *asked: Any) -> tuple[Any, ...] | None:
    """What a recording and its proof depend on; None where a part is more than its class and ordinary tensors."""
    try:
        digest, classes = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()), []
    except TypeError:  # a picture in the call
        return None
    for name, part in {"": pipeline, **pipeline.components}.items():
        own = getattr(part, "__dict__", {})
        if any(isinstance(value, FunctionType | MethodType | partial) for value in own.values()):
            return None  # a method of its own
        classes.append(type(part))
        simple = {key: value for key, value in own.items() if isinstance(value, bool | int | float | str | None)}
        digest.update(repr((name, _told(part), simple if part is pipeline else None)).encode())
        if not isinstance(part, nn.Module):
            continue
        if not isinstance(part, ConfigMixin | PreTrainedModel):
            return None  # what it does is told by no configuration
        if any(module._forward_hooks or module._forward_pre_hooks for module in part.modules()):
            return None
        for key, value in (*part.named_parameters(), *part.named_buffers()):
            if type(value) not in (torch.Tensor, nn.Parameter) or value.device.type != "cpu":
                return None
            digest.update(repr((key, value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return (digest.hexdigest(), *classes)


def _told(part: Any) -> str:
    """A part's configuration or vocabulary, without what it says of how it came about: in memory, or from a folder."""
    if isinstance(part, PreTrainedTokenizerBase):
        told = {**part.get_vocab(), "": [part.model_max_length, part.padding_side, part.chat_template]}
    elif isinstance(part, PreTrainedModel):
        told = part.config.to_dict()
    else:
        told = part.config if isinstance(part, ConfigMixin) else {}
    return json.dumps({name: told[name] for name in told if not name.startswith("_")}, sort_keys=True, default=str)
