"""Padding prompts of several lengths into one batch, where the network has a mask and padding is proven harmless on it.

Each prompt is encoded alone, as users sample. Filled up to the longest one, and masked, it must be what it was: the
network's answers are compared, with noise in the place of the padding, which a mask that works hides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.tree import Leaf, SampleList, leaves, map_paths
from fewstep.recording import Recording
from fewstep.recording.loop.call_parts import without_sample
from fewstep.recording.pipeline import evaluating
from fewstep.recording.proof.proof import tolerance
from fewstep.recording.proof.runs import relative_error
from fewstep.recording.telling import CONDITION_STEPS
from fewstep.recording.watch.shake import shaken

_TRIED = 4  # items that are compared, the shortest among them, each beside the longest
_TIMES = (0.9, 0.4)
#: Without its mask the padding must change the answer by so many tolerances, else the comparison says nothing.
_VISIBLE = 30


class _CannotPadError(Exception):
    """Raised where items do not differ in the length of a text alone; never leaves this module."""


@dataclass(frozen=True)
class Padding:
    """How items of several lengths are made one batch.

    Attributes:
        masks: the network's mask arguments, by their path in the conditioning, and the dtype of the full mask that an
            item without one is given (None stands for "all valid").
    """

    masks: Mapping[str, torch.dtype]

    def padded(self, items: Sequence[Conditioning]) -> list[Conditioning]:
        """The items (one sample each), filled up at their ends to the longest and masked there.

        They come back as they are where they form a batch already, or cannot be padded.
        """
        if all(Conditioning.compatible(items[0], item) for item in items[1:]):
            return list(items)
        try:
            return _filled(items, self.masks)
        except _CannotPadError:
            return list(items)


def find_padding(recording: Recording, items: Mapping[Any, Conditioning]) -> Padding | None:
    """The padding that is proven harmless on this network; None: there is none, and items are grouped by shape.

    Args:
        recording: of the teacher.
        items: of several shapes, by prompt or label, each encoded alone.
    """
    names, some = list(items), list(items.values())
    if all(Conditioning.compatible(some[0], item) for item in some):
        return None
    try:
        lengths = dict(zip(names, _lengths(some), strict=True))
    except _CannotPadError:
        return None
    # Where the lengths agree, items without a mask come first, and one with a mask last.
    order = sorted(names, key=lambda name: (lengths[name], _count_tensors(items[name])))
    masks = _find_masks(recording, order, items)
    if not masks:
        return None
    padding = Padding(masks)
    tried = [items[name] for name in order[: -1 : max(len(order) // _TRIED, 1)]]
    try:
        # Each of several experts has to answer padded items as it answers them alone.
        harmless = all(_harmless(recording.of(one), padding, tried, items[order[-1]]) for one in recording.experts)
    except Exception:  # whatever a network says of a form that its pipeline never gave it: that form does not serve
        return None
    return padding if harmless else None


def _filled(
    items: Sequence[Conditioning],
    masks: Mapping[str, torch.dtype],
    noise: torch.Generator | None = None,
    *,
    unmasked: bool = False,
) -> list[Conditioning]:
    """All items as long as the longest; `noise` fills them in the place of zeros; `unmasked`: as if that were valid."""
    lengths = _lengths(items)
    longest = max(lengths)
    columns: list[dict[str, Any]] = [dict(leaves(item.tree)) for item in items]

    def fill(path: str, node: Leaf | SampleList, length: int) -> Leaf | SampleList:
        others = [column[path] for column in columns]
        if path in masks and isinstance(node, Leaf):  # as every mask is
            rows = max(max(other.rows for other in others), 1)
            mask = torch.ones(rows, length, dtype=masks[path]) if node.value is None else node.value
            extra = mask.new_full((len(mask), longest - length), int(unmasked))
            return Leaf(torch.cat([mask, extra], 1), rows)
        if isinstance(node, SampleList) or not isinstance(node.value, Tensor):
            return node
        axis = _differing_axis(others)
        if axis is None:
            return node
        if not node.rows:
            # Shared by the batch, such as position ids: the longest item's, of which each other's is the beginning.
            whole = next(other.value for other in others if other.value.shape[axis] == longest)
            if not torch.equal(whole.narrow(axis, 0, length), node.value):
                raise _CannotPadError
            return Leaf(whole)
        shape = list(node.value.shape)
        shape[axis] = longest - length
        extra = node.value.new_zeros(shape)
        if noise is not None and extra.is_floating_point():
            extra = torch.randn(shape, generator=noise).to(extra) * node.value.float().std().clamp(min=1e-3).to(extra)
        return Leaf(torch.cat([node.value, extra], axis), node.rows)

    return [
        Conditioning(map_paths(item.tree, partial(fill, length=length)), item.batch_size)
        for item, length in zip(items, lengths, strict=True)
    ]


def _lengths(items: Sequence[Conditioning]) -> list[int]:
    """The length of each item: the size of all tensors that differ, along the one axis in which they do.

    Items that differ only in that some have a mask and others None are as long as the mask.
    """
    columns: list[dict[str, Any]] = [dict(leaves(item.tree)) for item in items]
    if any(column.keys() != columns[0].keys() for column in columns):
        raise _CannotPadError
    found: set[tuple[int, ...]] = set()
    widths: set[int] = set()
    for path, first in columns[0].items():
        nodes = [column[path] for column in columns]
        if any(type(node) is not type(first) for node in nodes):
            raise _CannotPadError
        tensors = [node.value for node in nodes if isinstance(node, Leaf) and isinstance(node.value, Tensor)]
        if len(tensors) == len(nodes):
            axis = _differing_axis(nodes)
            found |= set() if axis is None else {tuple(tensor.shape[axis] for tensor in tensors)}
        elif tensors and all(_mask_like(tensor) for tensor in tensors):
            widths |= {tensor.shape[1] for tensor in tensors}
        elif tensors:
            raise _CannotPadError
    if not found and len(widths) == 1:
        return list(widths) * len(items)
    if len(found) != 1:
        raise _CannotPadError
    return list(found.pop())


def _differing_axis(nodes: Sequence[Leaf]) -> int | None:
    """The one axis along which these tensors differ in size; None where their shapes agree."""
    shapes = [node.value.shape for node in nodes]
    if any(node.rows != nodes[0].rows for node in nodes) or len({len(shape) for shape in shapes}) != 1:
        raise _CannotPadError
    axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(axes) > 1 or (axes == [0] and nodes[0].rows):
        raise _CannotPadError
    return axes[0] if axes else None


def _mask_like(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and bool(((value == 0) | (value == 1)).all())


def _count_tensors(item: Conditioning) -> int:
    return sum(isinstance(node, Leaf) and isinstance(node.value, Tensor) for _, node in leaves(item.tree))


def _find_masks(
    recording: Recording, order: Sequence[Any], items: Mapping[Any, Conditioning]
) -> dict[str, torch.dtype]:
    """The mask arguments: zeros and ones as long as the text, in an item, or where a prompt stands beside a longer one.

    Args:
        recording: of the teacher.
        order: names, the shortest first.
        items: by name.
    """
    columns: list[dict[str, Any]] = [dict(leaves(items[name].tree)) for name in order]
    lengths = _lengths([items[name] for name in order])
    beside = _beside(recording, [order[0], order[-1]])
    found: dict[str, torch.dtype] = {}
    for path, node in columns[0].items():
        if not isinstance(node, Leaf):
            continue
        pairs = [(column[path].value, n) for column, n in zip(columns, lengths, strict=True)]
        seen = [(value, n) for value, n in pairs if value is not None] or [(beside.get(path), lengths[-1])]
        if all(_mask_like(value) and value.shape[1] == n for value, n in seen):
            found[path] = seen[0][0].dtype
    return found


def _beside(recording: Recording, two: list[Any]) -> dict[str, Any]:
    """What the pipeline's own call with two prompts tells its network, by path: there a mask shows that None hides."""
    seen = recording.subject.run(CONDITION_STEPS, two, before=recording.component).pending[-1]
    return dict(leaves(without_sample(seen, recording.recipe)))


@torch.no_grad()
def _harmless(recording: Recording, padding: Padding, tried: Sequence[Conditioning], long: Conditioning) -> bool:
    """Whether padded items are answered as alone, on the weights as they are and shaken, and whether it would show."""
    allowed = max(1e-5, tolerance(recording))
    seen = all(len(set(_lengths([item, long]))) == 1 for item in tried)
    for weights in (contextlib.nullcontext(), shaken(recording.network)):
        with weights, evaluating(recording.network):
            for seed, item in enumerate(tried):
                pair, generator = [item, long], torch.Generator().manual_seed(seed)
                alone = _answer(recording, item, seed)
                forms = [
                    _filled(pair, padding.masks, generator)[0],
                    Conditioning.cat(_filled(pair, padding.masks)),
                ]
                if any(not relative_error(_answer(recording, form, seed), alone) <= allowed for form in forms):
                    return False
                bare = _filled(pair, padding.masks, generator, unmasked=True)[0]
                seen = seen or relative_error(_answer(recording, bare, seed), alone) > _VISIBLE * allowed
    return seen


def _answer(recording: Recording, told: Conditioning, seed: int) -> Tensor:
    """The network's answers to the first of the samples, all with one random x, at some times: (times, ...)."""
    parameter = next(recording.network.parameters())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *recording.sample_shape, generator=generator).to(parameter.device, recording.dtype)
    x = x.expand(told.batch_size, *recording.sample_shape)
    told = told.to(parameter.device)
    answers = []
    for time in _TIMES:
        timestep = recording.schedule.timestep(torch.full((told.batch_size,), time, dtype=torch.float64))
        answer = recording.recipe.call(recording.network, x, timestep, told, next_timestep=timestep / 2)
        answers.append(answer[0])
    return torch.stack(answers)
