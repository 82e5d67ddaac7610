"""What decides a teacher's conditioning, as short digests: the same in every process and wherever its folder lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.durable import json_sha256
from fewstep.recording import Recording
from fewstep.recording.call.numbers import SCALES
from fewstep.recording.pipeline import find_decoder, find_scheduler, is_quantized

#: Entries of a configuration that say where something came from or how it was saved, and not what it does.
_ORIGIN = frozenset({"name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})
#: What a tokenizer writes into its backend whenever it is called.
_CALL_STATE = ("padding", "truncation")
SAMPLED = 1024  # entries of each of the denoiser's tensors
SAMPLED_IN_MEMORY = 2**16  # entries of each tensor of a pipeline that lies in no folder


def fingerprint(recording: Recording) -> dict[str, str]:
    """A digest for each part of a recorded teacher, by name.

    Everything that may run before the denoiser counts in full: text encoders, projections (all weights), tokenizers,
    and of items with pictures the autoencoder.
    Of the denoiser, some entries of every tensor count: enough to tell it from any other training, and cheap.
    Beside the parts of the pipeline there are ``pipeline`` (its class) and ``call``.
    """
    pipeline = recording.pipeline
    without = {find_scheduler(pipeline)} | _unasked(recording)
    digests = {"pipeline": _digest(type(pipeline).__name__), "call": call_digest(recording)}
    for name, part in sorted(pipeline.components.items()):
        if part is not None and name not in without:
            digests[name] = part_digest(part, SAMPLED if name in recording.components else None)
    scheduler = getattr(pipeline, find_scheduler(pipeline))
    digests["scheduler"] = _digest([type(scheduler).__name__, _plain(scheduler.config)])
    return digests


def _unasked(recording: Recording) -> set[str | None]:
    """The decoder, which decides no conditioning but that of pictures: its other half encodes them."""
    return set() if recording.conditional == "item" else {find_decoder(recording.pipeline)}


def part_digest(part: Any, sampled: int | None = None) -> str:
    """The digest of one part of a pipeline.

    Args:
        part: a network, a tokenizer, a processor, or whatever else a pipeline holds. Of a quantised network only the
            configuration counts.
        sampled: of a network, so many evenly spaced entries of each tensor count; None: all of them.
    """
    if not isinstance(part, nn.Module) or is_quantized(part):
        return _digest(_description(part))
    state = hashlib.sha256(_digest(_description(part)).encode())
    for name, tensor in sorted(part.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().reshape(-1)
        if flat.is_floating_point():
            flat = flat.to(torch.bfloat16)  # in which a teacher may be loaded: the same checkpoint has the same digest
        state.update(f"{name} {flat.dtype} {list(tensor.shape)}".encode())
        if sampled is not None and len(flat) > sampled:
            flat = flat[:: len(flat) // sampled]
        state.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def call_digest(recording: Recording) -> str:
    """The digest of the recorded call, without defaults and a guidance that the network is not told."""
    invocation = recording.invocation
    call = {
        name: float(value) if _is_number(value) else _plain(value)  # 3 and 3.0 are the same guidance
        for name, value in recording.call.items()
        if not (name.endswith(SCALES) and not recording.guidance.embedded)
        and not _same(value, invocation.parameters.get(name))
    }
    return _digest(call)


def _same(value: Any, default: Any) -> bool:
    if _is_number(value) and _is_number(default):
        return value == default
    return type(value) is type(default) and not isinstance(value, Tensor) and bool(value == default)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _description(part: Any) -> list[Any]:
    """What a part is, weights apart."""
    kind = type(part).__name__
    if hasattr(part, "get_vocab"):
        return [kind, _tokenizer(part)]
    inner = {n: _description(getattr(part, n)) for n in ("tokenizer", "image_processor") if _has_part(part, n)}
    config = getattr(part, "config", None)
    if config is None and not isinstance(part, nn.Module) and hasattr(part, "to_dict"):
        config = part.to_dict()
    return [kind, _plain(config), getattr(part, "chat_template", None), inner]


def _has_part(part: Any, name: str) -> bool:
    return not isinstance(part, nn.Module) and getattr(part, name, None) is not None


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: dict[str, Any] | list[Any]
    if backend is not None:
        content = json.loads(backend.to_str())
        rules = {name: value for name, value in content.items() if name not in _CALL_STATE}
    else:
        rules = sorted(tokenizer.get_vocab().items())
    named = ("model_max_length", "padding_side", "truncation_side", "chat_template")
    settings = {name: getattr(tokenizer, name, None) for name in named}
    return {"rules": rules, **settings, "special": _plain(tokenizer.special_tokens_map)}


def _plain(value: Any) -> Any:
    """JSON for a configuration, origins left out; an object that JSON cannot hold counts by its class."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        kept = {str(name): _plain(child) for name, child in value.items()}
        return {name: child for name, child in kept.items() if not name.startswith("_") and name not in _ORIGIN}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def teacher_digest(recording: Recording, away: Mapping[str, str] | None = None) -> dict[str, str]:
    """What decides where a teacher's ODE leads, items and scales of guidance apart: a digest for each part of it.

    Args:
        recording: of the teacher.
        away: the digests of what encodes and is freed by now.
    """
    pipeline = recording.pipeline
    others = {find_scheduler(pipeline), *recording.components} | _unasked(recording)
    encoding = {name: part for name, part in pipeline.components.items() if part is not None and name not in others}
    quarters = torch.linspace(0, 1, 5, dtype=torch.float64)
    coefficients = [[f"{value:.6g}" for value in part.tolist()] for part in recording.schedule.coefficients(quarters)]
    networks = {name: part_digest(network, SAMPLED) for name, network in recording.networks.items()}
    schedule = json_sha256([recording.prediction_type, coefficients])
    encoders = {name: (away or {}).get(name) or part_digest(part) for name, part in encoding.items()}
    rescaling = recording.guidance.rescaling
    more = {}
    if rescaling is not None:
        axis = [] if rescaling.axis == -1 else [rescaling.axis]
        more["guidance"] = json_sha256([rescaling.kind, rescaling.share, *axis])
    return {**networks, **encoders, "schedule": schedule, "call": call_digest(recording), **more}


def memory_digests(pipeline: Any) -> dict[str, dict[str, Any]]:
    """A digest for each part of a pipeline that was handed over in memory, in the form of :mod:`.contents`.

    Bits count, where a teacher's digest rounds: of a network's tensors up to :data:`SAMPLED_IN_MEMORY` evenly spaced
    entries each, quantised ones included; of other parts their settings.
    """
    return {
        name: {"sha256": _bits_digest(part) if isinstance(part, nn.Module) else _digest(_description(part))}
        for name, part in sorted(pipeline.components.items())
        if part is not None
    }


def _bits_digest(network: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        for number, plain in enumerate(_plain_tensors(tensor)):
            flat = plain.detach().reshape(-1)
            flat = flat[:: max(1, len(flat) // SAMPLED_IN_MEMORY)]
            state.update(f"{name} {number} {plain.dtype} {list(plain.shape)}".encode())
            state.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _plain_tensors(value: Any) -> list[Tensor]:
    """The ordinary tensors that a weight consists of: a quantised one has several."""
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__"):
        return [plain for name in value.__tensor_flatten__()[0] for plain in _plain_tensors(getattr(value, name))]
    return [value.as_subclass(Tensor)]
