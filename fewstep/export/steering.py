"""NASA: a student that steers away from a negative prompt in its attention, which a student cannot by guidance."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fewstep.errors import one_line
from fewstep.export.about import call_of, student_class
from fewstep.export.apply import adapter_class
from fewstep.export.errors import ExportError
from fewstep.export.related.record import relative_of
from fewstep.recording.call.invocation import condition_kind

#: Of the scales tried on the embedded teacher's students (docs/sample.md), the one that is steady over all pairs.
SCALE = 0.3
_NAME = "NasaPipeline"
# How far the network's answer may move, over its norm, when the negative's tokens are there and nothing is subtracted.
_LEAK = {torch.float32: 1e-3, torch.float64: 1e-3}
_LEAK_OF_HALVES = 1e-2


def nasa(pipe: DiffusionPipeline, negative_prompt: str, scale: float = SCALE) -> DiffusionPipeline:
    """The pipeline, steering away from a negative prompt, without training and without a further network call.

    Negative-away steer attention (SNOOPI, arXiv 2412.02687): in each attention to the text
    Z = Attn(Q, K(c+), V(c+)) - scale * Attn(Q, K(c-), V(c-)); see ``pipelines/nasa.py``. Its call takes
    ``nasa_negative_prompt`` and ``nasa_scale``, for that call alone; at 0 its pictures are the pipeline's, bit by bit.
    What ``save_pretrained`` writes is loaded by stock diffusers with ``trust_remote_code``.

    Args:
        pipe: a student, by ``fewstep.load``, ``fewstep.apply`` or stock diffusers; it stays as it is.
        negative_prompt: of all samples.
        scale: how strongly, from 0; the paper has 0.1 to 1, by model.

    Returns:
        Another pipeline of the same networks.

    Raises:
        ExportError: a pipeline without prompts, or one whose network mixes the texts other than by attention; a scale
            below 0; no text.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ExportError(f"only a pipeline can be steered, and this is a {type(pipe).__name__}; load it first")
    if not isinstance(negative_prompt, str):
        raise ExportError("the negative prompt must be one text, for all samples")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not (0 <= scale < math.inf):
        raise ExportError(f"the scale must be a number from 0, not {scale!r}")
    about = getattr(pipe, "fewstep", None)
    stock = _without_ours(type(pipe))
    if condition_kind(stock) != "prompt":
        raise ExportError(f"{stock.__name__} takes no prompt, so there is none to steer away from")
    file: Any = importlib.import_module("fewstep.pipelines.nasa")
    call = {} if about is None else call_of(stock, about)
    settings = {"nasa_negative_prompt": negative_prompt, "nasa_scale": float(scale)}
    text_first = _tried(file, pipe, stock, negative_prompt, call)
    steered = copy.copy(pipe)
    kind = file.nasa(stock)
    steered.__class__ = kind if about is None else _student_class(kind, stock, about, file.CODE_FILE)
    steered.register_to_config(**settings, nasa_text_first=text_first)
    return steered


def _without_ours(kind: type) -> type:
    """The class below those that fill in a student's call, or steer."""
    return next(k for k in kind.__mro__ if not hasattr(k, "fewstep") and k.__name__ != _NAME)


def _student_class(kind: type, stock: type, about: Mapping[str, Any], code: str) -> type[DiffusionPipeline]:
    told: dict[str, Any] = {**about, "code": code}
    if about.get("pipeline") in (_NAME, stock.__name__, None):
        told["pipeline"] = _NAME
    else:  # another pipeline of its family
        told["related"] = {**about.get("related", {}), _NAME: relative_of(stock, dict(about))}
    return adapter_class(kind, told) if "lora" in about else student_class(kind, told)


@torch.no_grad()
def _tried(file: Any, pipe: DiffusionPipeline, stock: type, negative: str, call: Mapping[str, Any]) -> bool:
    """Whether the network's text stands first: tried, as the answer must not move where nothing is subtracted."""
    name = type(pipe).__name__
    try:
        network, given = file.first_call(pipe, stock, "a photo", call)
        _, away = file.first_call(pipe, stock, negative, call)
        plain = _answer(network(**given))
        moved = {}
        for text_first in (False, True):
            with file.steering_of(network, away, 0.0, text_first):
                apart = (_answer(network(**given)) - plain).float().norm()
            moved[text_first] = (apart / plain.float().norm()).nan_to_num().item()
    except Exception as error:  # each network has exceptions of its own
        raise ExportError(f"{name} cannot be steered: {one_line(error)[:200]}") from error
    best = min(moved, key=moved.__getitem__)
    if moved[best] > _LEAK.get(plain.dtype, _LEAK_OF_HALVES):
        raise ExportError(
            f"{name} cannot be steered: its {type(network).__name__} sees its text otherwise than token by token, so "
            f"that the negative prompt would change what the prompt says (by {moved[best]:.1%})"
        )
    return best


def _answer(output: Any) -> Tensor:
    """The tensor that a network answers with, or the first of several."""
    first: Any = output if isinstance(output, Tensor) else output[0]
    answer: Tensor = first if isinstance(first, Tensor) else first[0]
    return answer
