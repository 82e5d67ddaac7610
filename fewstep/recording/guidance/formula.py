"""The pipeline's own formula of guidance, fitted to what its networks answered and what its scheduler was told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.call.invocation import Invocation
from fewstep.recording.call.numbers import SCALES
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.loop.call_parts import same_conditioning
from fewstep.recording.loop.denoisers import Denoisers
from fewstep.recording.loop.experts import Visits, components_of, expert_at
from fewstep.recording.watch.observation import Step, Stub
from fewstep.recording.watch.subject import Subject

# Below this relative difference two answers count as the same: a formula cannot be read off them.
_SAME = 1e-4
#: What is said where no formula can be read off.
NO_RESPONSE = "the answer does not depend on the prompt, even on shaken weights, so no formula was seen"


@dataclass(frozen=True)
class GuidedCall:
    """How to make a guided call again.

    Attributes:
        changes: its arguments beside the invocation's.
        order: which answer of the network is the positive one, and which are what guidance leads away from, in the
            order in which it does.
        calls: of the network in a step.
        stub: stands in for the network, for one sample.
    """

    changes: dict[str, Any]
    order: tuple[int, ...]
    calls: int
    stub: Stub = field(repr=False, compare=False)

    @property
    def positive(self) -> int:
        """Which answer is the positive one."""
        return self.order[0]

    @property
    def negative(self) -> int:
        """Which answer is the first that guidance leads away from."""
        return self.order[1]


@dataclass(frozen=True)
class FormulaFit:
    """Fits guided = n * negative + p * positive to guided steps of one sample.

    Attributes:
        denoisers: whose answers are combined.
        guided: the call that makes the steps, and which answer is which.
        scale: the pipeline's value of the guidance in that call.
    """

    denoisers: Denoisers
    guided: GuidedCall
    scale: float

    def __call__(self, steps: Sequence[Step]) -> tuple[tuple[float, float] | None, bool | None, float | None, str]:
        """(n, p) or None, whether the sum is linear, fewstep's scale less the pipeline's, and a remark."""
        columns = []
        for step in steps:
            both = self.denoisers.answers(step)
            columns.append([both[self.guided.negative], both[self.guided.positive], step.model_output[:1]])
        negative, positive, target = (torch.cat(c).double().flatten() for c in zip(*columns, strict=True))
        if (positive - negative).norm() <= _SAME * positive.norm():
            return None, None, None, NO_RESPONSE
        return _solve(negative, positive, target, self.scale)


def expert_guidance(
    subject: Subject, fit: FormulaFit, visits: Visits, pieces: list[Conditioning], off: tuple[str, float]
) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """The formula of each expert in the guided call, and the scale of each in the call as the user gave it.

    Args:
        subject: the pipeline.
        fit: of the guided call.
        visits: the run that meets every expert.
        pieces: what the first expert is told in a guided step.
        off: the argument that guides, and its value that switches guidance off.

    Raises:
        RecordingError: an expert is told something else than the first, or its sum is not linear.
    """
    formulas = _expert_formulas(subject, fit, visits, pieces)
    name, off_value = off
    given = subject.invocation.default(name)
    if given == fit.scale:
        own = formulas
    elif not isinstance(given, int | float) or given == off_value:
        own = [(0.0, 1.0)] * len(formulas)
    else:
        guided = replace(fit.guided, changes={**fit.guided.changes, name: given})
        own = _expert_formulas(subject, replace(fit, guided=guided, scale=float(given)), visits, pieces)
    return tuple(formulas), tuple(p for _, p in own)


def _expert_formulas(
    subject: Subject, fit: FormulaFit, visits: Visits, pieces: list[Conditioning]
) -> list[tuple[float, float]]:
    """(n, p) of each expert in the guided call of `fit`; (0, 1) where it is not guided."""
    experts = fit.denoisers.experts
    # Noise in the place of answers shows the formula whatever the weights are.
    stub = Stub(components_of(experts), live=frozenset({0}), scramble=True)
    steps = subject.run(visits.count, changes=fit.guided.changes, steps=visits.count, stub=stub).steps[1:]
    formulas = []
    for expert in experts:
        own = [step for step in steps if expert_at(experts, step.timestep) is expert]
        alone = replace(fit, denoisers=fit.denoisers.alone(expert))
        _check_told(subject, alone, pieces, own[0])
        formulas.append(_expert_formula(subject, alone, own))
    return formulas


def _check_told(subject: Subject, fit: FormulaFit, pieces: list[Conditioning], step: Step) -> None:
    """Raise where the expert of `fit` is told something else in a guided step than the first one is."""
    told = fit.denoisers.pieces(step)
    wanted = pieces if len(told) > 1 else [pieces[fit.guided.positive]]
    if len(told) != len(wanted) or not all(same_conditioning(a, b, set()) for a, b in zip(told, wanted, strict=True)):
        raise RecordingError(
            f"in a guided step {subject} tells {fit.denoisers.experts[0].component} something else than "
            f"{fit.denoisers.recipe.component}; networks that are called in different ways cannot be distilled "
            f"together yet: {ANOTHER}"
        )


def _expert_formula(subject: Subject, fit: FormulaFit, steps: list[Step]) -> tuple[float, float]:
    """(n, p) of the one expert of `fit`; (0, 1) where it is not guided."""
    if len(fit.denoisers.answers(steps[0])) == 1:
        return 0.0, 1.0
    formula, linear, _, _ = fit(steps)
    if formula is None or not linear:
        raise RecordingError(
            f"the guided sum of {subject} at {fit.denoisers.experts[0].component} is not linear, or not the same at "
            "all times, so its guidance scale cannot be read off; switch what changes the sum off in the call"
        )
    return _stated(subject.invocation, formula)


def _stated(invocation: Invocation, formula: tuple[float, float]) -> tuple[float, float]:
    """The formula with the numbers that the call itself names, where they are near: a fit is only nearly exact."""
    named = [invocation.default(n) for n in invocation.parameters if any(word in n for word in SCALES)]
    numbers = [float(v) + offset for v in named if isinstance(v, int | float) for offset in (0.0, 1.0)]
    w = min([*numbers, float(round(formula[1], 2))], key=lambda number: abs(number - formula[1]))
    return (1 - w, w) if abs(w - formula[1]) < 1e-3 * max(1.0, abs(w)) else formula


def _solve(
    negative: Tensor, positive: Tensor, target: Tensor, scale: float
) -> tuple[tuple[float, float] | None, bool, float | None, str]:
    design = torch.stack([negative, positive], dim=1)
    solution = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    if (design @ solution - target).norm() > 1e-3 * target.norm():
        return None, False, None, ""
    n, p = solution.tolist()
    if abs(n + p - 1) > 1e-3 * max(abs(n), abs(p)):
        return None, False, None, ""  # where both halves agree, guidance must leave them as they are
    for offset in (0.0, 1.0):
        w = scale + offset
        if abs(n - (1 - w)) < 1e-2 * w and abs(p - w) < 1e-2 * w:
            return (1 - w, w), True, offset, ""
    return (n, p), True, None, "an unusual formula"
