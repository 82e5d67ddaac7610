"""The pipeline's own formula of guidance, fitted to what its networks answered and what its scheduler was told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.call_parts import answers, network_calls, same_conditioning, split_pieces
from fewstep.recording.errors import RecordingError
from fewstep.recording.experts import Expert, Visits, components_of, expert_at
from fewstep.recording.invocation import SCALES, Invocation
from fewstep.recording.observation import Step, Stub
from fewstep.recording.observe import observe
from fewstep.recording.recipe import Recipe

# Below this relative difference two answers count as the same: a formula cannot be read off them.
_SAME = 1e-4
#: What is said where no formula can be read off.
DEAF = "the answer does not depend on the prompt, even on shaken weights, so no formula was seen"


@dataclass(frozen=True)
class FormulaFit:
    """Fits guided = n * negative + p * positive to guided steps of one sample.

    Attributes:
        recipe: of the network.
        positive: which of its answers is the positive one,
        negative: and which the negative.
        scale: the pipeline's value of the guidance.
    """

    recipe: Recipe
    positive: int
    negative: int
    scale: float

    def __call__(
        self, steps: Sequence[Step], components: Collection[str]
    ) -> tuple[tuple[float, float] | None, bool | None, float | None, str]:
        """(n, p) or None, whether the sum is linear, fewstep's scale less the pipeline's, and a remark."""
        columns = []
        for step in steps:
            both = answers(network_calls(step, components), self.recipe, step)
            columns.append([both[self.negative], both[self.positive], step.model_output[:1]])
        negative, positive, target = (torch.cat(c).double().flatten() for c in zip(*columns, strict=True))
        if (positive - negative).norm() <= _SAME * positive.norm():
            return None, None, None, DEAF
        return _solve(negative, positive, target, self.scale)


def expert_guidance(
    pipeline: Any,
    invocation: Invocation,
    fit: FormulaFit,
    experts: Sequence[Expert],
    visits: Visits,
    pieces: list[Conditioning],
    marked: dict[str, Any],
    changes: dict[str, Any],
    name: str,
    off: float,
) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """The formula of each expert in the guided call, and the scale of each in the call as the user gave it.

    Args:
        pipeline: of the recording.
        invocation: of its call.
        fit: with the guided call's scale.
        experts: from noise to data.
        visits: the run that meets them.
        pieces: what the first expert is told in a guided step.
        marked: the pattern of that.
        changes: to the call that guide it.
        name: the argument that switches guidance on,
        off: and its value that switches it off.

    Raises:
        RecordingError: an expert is told something else than the first, or its sum is not linear.
    """
    names = components_of(experts)
    # Noise in the place of answers shows the formula whatever the weights are.
    stub = Stub(names, live=frozenset({0}), scramble=True)

    def measured(changes: dict[str, Any], fit: FormulaFit) -> list[tuple[float, float]]:
        call = invocation.arguments([invocation.item], visits.count, **changes)
        steps = observe(pipeline, call, steps=visits.count, stub=stub).steps[1:]
        formulas = []
        for expert in experts:
            own = [step for step in steps if expert_at(experts, step.timestep) is expert]
            _check_told(pipeline, fit, expert, pieces, marked, own[0])
            formulas.append(_expert_formula(pipeline, invocation, fit, expert, own))
        return formulas

    formulas = measured(changes, fit)
    given = invocation.default(name)
    if given == fit.scale:
        own = formulas
    elif not isinstance(given, int | float) or given == off:
        own = [(0.0, 1.0)] * len(experts)
    else:
        own = measured({**changes, name: given}, replace(fit, scale=float(given)))
    return tuple(formulas), tuple(p for _, p in own)


def _check_told(
    pipeline: Any, fit: FormulaFit, expert: Expert, pieces: list[Conditioning], marked: dict[str, Any], step: Step
) -> None:
    """Raise where an expert is told something else in a guided step than the first one is."""
    told = split_pieces(network_calls(step, [expert.component]), fit.recipe, marked)
    wanted = pieces if len(told) > 1 else [pieces[fit.positive]]
    if len(told) != len(wanted) or not all(same_conditioning(a, b, set()) for a, b in zip(told, wanted, strict=True)):
        raise RecordingError(
            f"in a guided step {type(pipeline).__name__} tells {expert.component} something else than "
            f"{fit.recipe.component}; networks that are called in different ways cannot be distilled together yet"
        )


def _expert_formula(
    pipeline: Any, invocation: Invocation, fit: FormulaFit, expert: Expert, steps: list[Step]
) -> tuple[float, float]:
    """(n, p) of one expert; (0, 1) where it is not guided."""
    if len(answers(network_calls(steps[0], [expert.component]), fit.recipe, steps[0])) == 1:
        return 0.0, 1.0
    formula, linear, _, _ = fit(steps, [expert.component])
    if not linear:
        raise RecordingError(
            f"the guided sum of {type(pipeline).__name__} at {expert.component} is not linear, or not the same at all "
            "times, so its guidance scale cannot be read off; switch what changes the sum off in the call"
        )
    return _stated(invocation, formula)


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
