"""What networks without weights answer: drawn numbers in the shapes that their answers would have.

They follow all inputs, so that a recorder learns from a pipeline's own call how its network is called.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fewstep.programs.planning.memory import Footprint
from fewstep.programs.planning.weightless import movable


@contextmanager
def answering(pipeline: DiffusionPipeline, mode: FakeTensorMode) -> Iterator[dict[str, int]]:
    """Inside, the pipeline's fake networks take real tensors, and give drawn ones in the shapes of their answers.

    Gives the bytes that each network took at most beside its weights, by name, as they come up.
    """
    networks = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    taken = dict.fromkeys(networks, 0)
    # An autoencoder is asked for its other half by name.
    asked = [(name, half) for name in networks for half in ("forward", "encode") if hasattr(networks[name], half)]
    for name, half in asked:
        setattr(networks[name], half, _drawn(getattr(networks[name], half), mode, networks[name], taken, name))
    try:
        with movable():
            yield taken
    finally:
        for name, half in asked:
            delattr(networks[name], half)


def _drawn(
    forward: Callable[..., Any], mode: FakeTensorMode, network: nn.Module, taken: dict[str, int], name: str
) -> Callable[..., Any]:
    """`forward` on fake tensors for the shapes; it is run once for each shape of its inputs."""
    answers: dict[str, Any] = {}
    weights = [*network.parameters(), *network.buffers()]

    def shaped(value: Any) -> Any:
        given = isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, FakeTensor)
        return mode.from_tensor(value) if given else value

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        key = str(tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, Tensor) else v, (args, kwargs)))
        if key not in answers:
            with mode, Footprint(known=weights) as footprint, torch.no_grad():
                answers[key] = forward(*tree_map(shaped, args), **tree_map(shaped, kwargs))
            taken[name] = max(taken[name], footprint.peak)
        leaves, structure = tree_flatten(answers[key])
        return tree_unflatten(draw(given, leaves), structure)

    # The signature stays visible: pipelines and the recorder ask for it.
    return update_wrapper(stand_in, forward, assigned=(), updated=())


def draw(given: list[Tensor], like: list[Any]) -> list[Any]:
    """Real values like the leaves of an answer, in which tensors are fake."""
    drawn = list(like)
    for place, leaf in enumerate(like):
        own = {} if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {})
        held = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        if held:
            drawn[place] = copy.copy(leaf)  # a distribution
            vars(drawn[place]).update(zip(held, draw(given, list(held.values())), strict=True))
        elif isinstance(leaf, Tensor) and not leaf.is_floating_point():
            drawn[place] = torch.zeros(leaf.shape, dtype=leaf.dtype)
    floats = [place for place, leaf in enumerate(like) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for rows, dtype in {(_rows(like[place]), like[place].dtype) for place in floats}:
        alike = [place for place in floats if (_rows(like[place]), like[place].dtype) == (rows, dtype)]
        values = _drawn_rows(given, rows, [like[place].shape for place in alike], dtype)
        for place, value in zip(alike, values, strict=True):
            drawn[place] = value
    return drawn


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def _drawn_rows(given: list[Tensor], rows: int, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """Tensors whose rows follow the same row of every input that has as many, or the same ones of one that has several
    for each (a first and a last picture, one behind the other); no two of them are equal.

    They overlap in one long row for each sample: an encoder may answer with the hidden states of all its layers.
    """
    sizes = [math.prod(shape[1:]) for shape in shapes]
    long = max(sizes) + _APART * (len(sizes) - 1)
    seed = hashlib.blake2b(str((long, *map(tuple, (shape[1:] for shape in shapes)))).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
    pattern = torch.randn(long, generator=generator)
    answer = pattern.expand(rows, long).clone()
    for number, value in enumerate(given, 1):
        weight = torch.sin(_projected(value.reshape(rows if _is_divided(value, rows) else 1, -1), generator)).float()
        answer.addcmul_(pattern.roll(number), weight[:, None])
    answer = answer.to(dtype)
    return [
        answer[:, _APART * number : _APART * number + size].reshape(shape)
        for number, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
    ]


def _is_divided(value: Tensor, rows: int) -> bool:
    """Whether an input has rows for each row of the answer. What all share (positions of tokens) has two dimensions."""
    if value.dim() == 0:
        return False
    return value.shape[0] == rows or (value.dim() > 2 and value.shape[0] > 0 and value.shape[0] % rows == 0)


#: Entries between the first numbers of two tensors of one answer, a prime: none is another one that is moved by tokens.
_APART = 101


def _projected(seen: Tensor, generator: torch.Generator) -> Tensor:
    """Each row of ``seen`` (R, N) in one direction that no entry is without, (R,) in float64.

    It is an outer product, as a drawn number for each entry of a video would take longer than all else, and is taken in
    parts, as a video in float64 would take more memory than all else.
    """
    count = seen.shape[1]
    width = max(1, math.isqrt(count))
    whole = count - count % width
    across, along, rest = (
        torch.randn(size, generator=generator, dtype=torch.float64) / max(size, 1) ** 0.5
        for size in (width, whole // width, count - whole)
    )
    lines = seen[:, :whole].unflatten(1, (-1, width)).split(_PART, 1)
    return torch.cat([part.double() @ across for part in lines], 1) @ along + seen[:, whole:].double() @ rest


#: Lines of a projected tensor that are looked at together.
_PART = 1024
