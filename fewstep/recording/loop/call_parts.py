"""What captured network calls told the network: conditioning taken out of them, split into samples, and compared."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning, mark, remark
from fewstep.conditioning.tree import Leaf, SampleList, leaves, map_paths
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.recipe import Recipe
from fewstep.recording.rules.feeding import unfed
from fewstep.recording.watch.observation import NetworkCall, Step


def without_sample(call: NetworkCall, recipe: Recipe) -> dict[str, Any]:
    """The arguments of a network call other than the sample and the times, and what of theirs is neither.

    Of a second network's answers too; what that itself is told stands under its name.

    Raises:
        ValueError: an argument that holds the sample has no room for it.
    """
    second = recipe.second
    links = [] if second is None else [link.argument for link in second.links]
    told = unfed(call.arguments, recipe.sample, recipe.times, links)
    if second is not None:
        told[second.component] = second.told(_beside(call, second.component).arguments)
    return told


def _beside(call: NetworkCall, component: str) -> NetworkCall:
    """The last call of another component before this one in its step."""
    return next(one for one in reversed(call.earlier) if one.component == component)


def network_calls(step: Step, components: Collection[str]) -> list[NetworkCall]:
    """The calls of the denoisers in a step (the first step also holds the text encoders')."""
    return [call for call in step.calls if call.component in components]


def mark_arguments(component: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """`one` (one sample), marked by comparison with `two` (the same sample twice)."""
    try:
        return mark(one, two)
    except ValueError as error:
        raise RecordingError(
            f"how the conditioning of {component} depends on the batch was not understood ({error}): {ANOTHER}"
        ) from error


class UnevenError(RecordingError):
    """A second network that is asked for fewer answers than the network which is told of its own."""


def split_pieces(calls: list[NetworkCall], recipe: Recipe, marked: dict[str, Any]) -> list[Conditioning]:
    """The conditioning of each answer that the network was asked for, one sample each, in the pipeline's order.

    Raises:
        RecordingError: the calls differ from the recorded one in more than their rows.
    """
    pieces = []
    for call in calls:
        rows = len(call.arguments[recipe.sample.argument])
        _refuse_uneven(call, recipe, rows)
        try:
            told = without_sample(call, recipe)
            # What is None is as good as not said, there and here.
            told = {name: value for name, value in told.items() if name in marked or value is not None}
            told = {**{name: None for name in marked if _is_none(marked[name])}, **told}
            whole = remark(told, marked, rows, more=True)
        except ValueError as error:
            raise RecordingError(
                f"the guided call cannot be split ({error}): switch the guidance off in the call, or {ANOTHER}"
            ) from error
        pieces += [whole.select([i]) for i in range(rows)]
    return pieces


def _is_none(node: Any) -> bool:
    return isinstance(node, Leaf) and node.value is None


def _refuse_uneven(call: NetworkCall, recipe: Recipe, rows: int) -> None:
    if (second := recipe.second) is None:
        return
    asked = len(_beside(call, second.component).arguments[second.sample.argument])
    if asked != rows:
        raise UnevenError(
            f"in a guided step {second.component} is asked for {asked} of the {rows} answers that {call.component} "
            "gives, which is not understood"
        )


def repeated(x: Tensor, rows: int, batch: int) -> Tensor:
    """The first `batch` samples of x, over and over until there are `rows`: what a guided call is given."""
    return x[:batch].repeat(rows // batch, *[1] * (x.dim() - 1))


def answers(calls: list[NetworkCall], recipe: Recipe, step: Step, batch: int = 1) -> list[Tensor]:
    """What the network answered to each piece, as `model_output` would be without guidance; (1, *sample_shape) each."""
    found = []
    for call in calls:
        rows = len(call.arguments[recipe.sample.argument])
        x = repeated(step.network_input, rows, batch)
        output = recipe.output.model_output(call.output, x, torch.full((rows,), step.timestep, dtype=torch.float64))
        found += list(output.split(1))
    return found


def same_conditioning(a: Conditioning, b: Conditioning, ignored: set[str], *, padded: bool = False) -> bool:
    """Whether two conditionings agree to rounding (1e-4), `ignored` top-level arguments apart.

    With `padded`, a's tensors may be longer along one axis, what b lacks counts not, and b's part is compared.
    """
    one, two = ({name: node for name, node in each.arguments().items() if name not in ignored} for each in (a, b))
    return equal(one, two, padded)


def in_types_of(piece: Conditioning, alone: Conditioning) -> Conditioning:
    """A guided call's piece with its whole numbers (a mask) in the types that they have without guidance."""
    types = {path: node.value.dtype for path, node in leaves(alone.tree) if isinstance(node, Leaf) and _is_count(node)}

    def cast(path: str, node: Leaf | SampleList) -> Leaf | SampleList:
        if isinstance(node, Leaf) and _is_count(node) and path in types:
            return Leaf(node.value.to(types[path]), node.rows)
        return node

    return Conditioning(map_paths(piece.tree, cast), piece.batch_size)


def _is_count(node: Leaf) -> bool:
    return isinstance(node.value, Tensor) and _counts(node.value)


def _counts(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()


def equal(a: Any, b: Any, padded: bool = False) -> bool:
    """Whether two arguments agree to rounding, containers included; `padded` as in `same_conditioning`."""
    if padded and b is None:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if padded and a.dim() == b.dim() and sum(m != n for m, n in zip(a.shape, b.shape, strict=True)) == 1:
            axis = next(i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n)
            spare = a.shape[axis] - b.shape[axis]
            return spare > 0 and any(equal(a.narrow(axis, start, b.shape[axis]), b) for start in (0, spare))
        if a.shape != b.shape or (a.dtype != b.dtype and not (_counts(a) and _counts(b))):
            return False
        if _counts(a):
            return torch.equal(a.long(), b.long())  # a mask may be integers alone, and booleans beside another one
        if a.is_complex():
            return torch.equal(a, b)
        scale = torch.maximum(a.abs().max(), b.abs().max()) if a.numel() else 0
        return a.numel() == 0 or bool((a - b).abs().max() <= 1e-4 * scale)
    if isinstance(a, dict) and isinstance(b, dict):
        same = b.keys() <= a.keys() if padded else b.keys() == a.keys()
        return same and all(equal(a[key], b[key], padded) for key in b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(equal(x, y, padded) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and a == b
