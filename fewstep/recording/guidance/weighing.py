"""How a pipeline weighs several answers of its network: fitted to guided runs at several scales.

With a1 the positive answer, the sum is written an + sum w_k (a_k - a_(k+1)), as :mod:`fewstep.networks.guidance` has
it: neg + w (pos - neg) of two, u + w_t (t - i) + w_i (i - u) of three. A scale may differ from frame to frame, and the
sum of two may be brought to the norm of the positive.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.diffusion.rescaling import KINDS, Rescaling

# Relative: what a fit leaves, in float32 and in bfloat16.
_CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}
_CLOSE_IN_HALF = 2e-2


@dataclass(frozen=True)
class GuidedRun:
    """What a guided run showed.

    Attributes:
        values: the pipeline's guidance scales, by argument.
        answers: of the network, in the pipeline's order: (S, *sample_shape) each, of S steps.
        target: what the scheduler was given, (S, *sample_shape).
    """

    values: Mapping[str, float]
    answers: Sequence[Tensor]
    target: Tensor


@dataclass(frozen=True)
class Weighing:
    """How the answers are weighed.

    Attributes:
        order: which of the pipeline's answers is a1, a2, and on.
        scales: w_1 and on in the first run; where they differ from place to place, () and see ``places``.
        follows: for each of them the argument that it follows, and what it is more than that; None: not seen.
        places: w_1 at each place along ``axis`` of (B, *sample_shape), where it differs there.
        axis: see ``places``.
        rescaled: what is then done to the sum; None: nothing.
    """

    order: tuple[int, ...]
    scales: tuple[float, ...] = ()
    follows: tuple[tuple[str, float] | None, ...] = ()
    places: tuple[float, ...] = ()
    axis: int = 0
    rescaled: Rescaling | None = None

    def describe(self) -> str:
        """In words."""
        if self.places:
            ends = f"{self.places[0]:.4g} to {self.places[-1]:.4g}"
            return f"a scale for each of {len(self.places)} places along axis {self.axis}, {ends}"
        words = "" if self.rescaled is None else f", {self.rescaled.describe()}"
        pairs = zip(self.scales, self.follows, strict=True)
        named = [f"{w:.4g}" + (f" ({name[0]})" if name else "") for w, name in pairs]
        return f"scales {', '.join(named)}{words}"

    def combined(self, answers: Sequence[Tensor]) -> Tensor:
        """The weighed sum (B, ...) of answers (B, ...) in the order a1, a2, ..."""
        steps = [a - b for a, b in itertools.pairwise(answers)]
        if self.places:
            shape = [1] * answers[0].dim()
            shape[self.axis] = len(self.places)
            scales: Sequence[float | Tensor] = [torch.tensor(self.places, dtype=answers[0].dtype).reshape(shape)]
        else:
            scales = self.scales
        total = answers[-1] + sum((w * step for w, step in zip(scales, steps, strict=True)), torch.zeros(()))
        return total if self.rescaled is None else self.rescaled(total, answers[0])


def weigh(runs: Sequence[GuidedRun], positive: int) -> Weighing | None:
    """How the answers of these runs are weighed; None where no such sum gives what the scheduler was given.

    Args:
        runs: at different scales.
        positive: which of the pipeline's answers is the positive one.
    """
    others = [number for number in range(len(runs[0].answers)) if number != positive]
    found = None
    for order in ((positive, *rest) for rest in itertools.permutations(others)):
        scales = [_scales(run, order) for run in runs]
        if all(given is not None for given in scales):
            each = list(zip(*(given for given in scales if given is not None), strict=True))
            follows = tuple(_followed(numbers, runs) for numbers in each)
            named = [name for name in follows if name is not None]
            own = tuple(
                numbers[0] if name is None else runs[0].values[name[0]] + name[1]
                for numbers, name in zip(each, follows, strict=True)
            )
            if len(named) == len({name for name, _ in named}) == len(each):
                return Weighing(order, own, follows)
            if len(each) == 1:
                found = Weighing(order, own, follows)
    if len(others) == 1 and (found is None or found.follows == (None,)):
        order = (positive, others[0])
        found = (None if found else _placed(runs[0], order)) or _rescaled(runs, order) or found
    return found


def _scales(run: GuidedRun, order: Sequence[int]) -> list[float] | None:
    """w_1 and on of one run; None: there are no such numbers."""
    answers = [run.answers[number].double() for number in order]
    steps = torch.stack([(a - b).flatten() for a, b in itertools.pairwise(answers)], 1)
    rest = (run.target.double() - answers[-1]).flatten()
    solution = torch.linalg.lstsq(steps, rest[:, None]).solution[:, 0]
    left = (steps @ solution - rest).norm()
    return solution.tolist() if left <= _allowed(run.target) * run.target.double().norm() else None


def _followed(numbers: Sequence[float], runs: Sequence[GuidedRun]) -> tuple[str, float] | None:
    """The argument that a scale follows over all runs, and what it is more than that."""
    allowed = 10 * _allowed(runs[0].target)
    for name in runs[0].values:
        for more in (0.0, 1.0):
            pairs = zip(numbers, runs, strict=True)
            if all(abs(w - run.values[name] - more) <= allowed * max(1.0, abs(w)) for w, run in pairs):
                return name, more
    return None


def _placed(run: GuidedRun, order: tuple[int, int]) -> Weighing | None:
    """A scale of its own for each place along one axis."""
    for axis in range(1, run.target.dim()):
        parts = []
        for place in range(run.target.shape[axis]):
            at = [answer.narrow(axis, place, 1) for answer in run.answers]
            parts.append(_scales(GuidedRun(run.values, at, run.target.narrow(axis, place, 1)), (order[0], order[1])))
        if all(part is not None for part in parts):
            return Weighing(order, places=_stated([part[0] for part in parts if part is not None], run), axis=axis)
    return None


def _stated(places: list[float], run: GuidedRun) -> tuple[float, ...]:
    """The scales as the call's own numbers give them, evenly from one to another, where they are near that."""
    for first, last in itertools.permutations(run.values.values(), 2):
        even = torch.linspace(first, last, len(places)).tolist()
        if all(abs(a - b) <= 10 * _allowed(run.target) * max(1.0, abs(b)) for a, b in zip(places, even, strict=True)):
            return tuple(even)
    return tuple(round(place, 4) for place in places)


def _rescaled(runs: Sequence[GuidedRun], order: tuple[int, int]) -> Weighing | None:
    """A sum that is then brought to the positive's size, by one share in all runs."""
    axes = range(-1, -runs[0].target.dim(), -1)
    forms = [Rescaling(kind, axis=axis) for kind in KINDS for axis in (axes if kind == "tokens" else (-1,))]
    for form, name, more in itertools.product(forms, runs[0].values, (0.0, 1.0)):
        sums = []
        for run in runs:
            positive, negative = (run.answers[number].double() for number in order)
            total = torch.lerp(negative, positive, run.values[name] + more)
            sums.append((run.target.double(), total, total * (form.factor(total, positive) - 1)))
        share = sum(float(((target - total) * change).sum()) for target, total, change in sums)
        share /= max(sum(float(change.square().sum()) for *_, change in sums), 1e-300)
        allowed = _allowed(runs[0].target)
        if abs(share - round(share, 2)) < 10 * allowed:  # calls name such numbers
            share = round(share, 2)
        left = [(target - total - share * change).norm() / target.norm() for target, total, change in sums]
        if 0 < share <= 1 and all(one <= allowed for one in left):
            return Weighing(order, (runs[0].values[name] + more,), ((name, more),), rescaled=replace(form, share=share))
    return None


def _allowed(like: Tensor) -> float:
    return _CLOSE.get(like.dtype, _CLOSE_IN_HALF)
