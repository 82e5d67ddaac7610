"""How a pipeline that is told pictures is guided: the answers that it asks for, which are without the picture, the sum.

The negative of such a pipeline mostly holds the item's own picture, so that each item has its own; in some it holds
none, or another one, and some pipelines ask for a third answer. All of it is read off guided calls.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.item import PROMPT, Item
from fewstep.conditioning.tree import Leaf, leaves
from fewstep.recording.call.items import with_pictures_of
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.guidance.formula import FormulaFit, GuidedCall, expert_guidance
from fewstep.recording.guidance.guided import Guided, find_guided
from fewstep.recording.guidance.report import GuidanceReport
from fewstep.recording.guidance.runs import guided_runs
from fewstep.recording.guidance.weighing import Weighing, weigh
from fewstep.recording.items.learning import Told
from fewstep.recording.items.marks import moved_paths
from fewstep.recording.loop.call_parts import UnevenError, same_conditioning
from fewstep.recording.loop.denoisers import Denoisers
from fewstep.recording.watch.observation import Step
from fewstep.recording.watch.subject import Subject

_STEPS = 4


def record_item_guidance(
    subject: Subject, denoisers: Denoisers, embedded: set[str], told: Told
) -> tuple[GuidanceReport, GuidedCall | None]:
    """What was found out about the guidance of items, and how to repeat a guided call.

    Args:
        subject: with guidance off.
        denoisers: of its loop.
        embedded: their arguments that follow an embedded guidance.
        told: what pictures and draws change of what they are told.

    Raises:
        RecordingError: the pipeline weighs its answers in a way that is not understood.
    """
    try:
        found = find_guided(subject, denoisers)
    except UnevenError as error:
        raise _say_what_evens(error, subject, denoisers) from error
    if isinstance(found, str):
        return GuidanceReport(embedded=bool(embedded), remark=found), None
    positive = _positive(subject, denoisers, found, embedded, told)
    runs = guided_runs(subject, denoisers, found.changes, found.name, found.scale)
    weighing = weigh(runs, positive)
    if weighing is None and len(found.pieces) > 2:
        raise RecordingError(
            f"a guided step of {subject} asks its network for {len(found.pieces)} answers and weighs them in a way "
            "that is not understood; switch the further guidance off in the call"
        )
    order = (positive, 1 - positive) if weighing is None else weighing.order
    calls = len(denoisers.calls(found.steps[0]))
    guided = GuidedCall(found.changes, order, calls, denoisers.stub)
    default = subject.invocation.default(found.name)
    report = GuidanceReport(
        off_argument=(found.name, found.off),
        argument_scale=float(default) if isinstance(default, int | float) else None,
        embedded=bool(embedded),
        calls=calls,
        order=", ".join(_NAMES[min(order.index(number), 2)] for number in range(len(order))),
        formula_scale=found.scale,
        linear=weighing is not None and not weighing.rescaled,
        weighing=weighing,
        pictures=_pictures(subject, denoisers, found, order),
    )
    return _with_formula(report, weighing, subject, denoisers, found, guided), guided


def _say_what_evens(error: UnevenError, subject: Subject, denoisers: Denoisers) -> RecordingError:
    """The error with the switch of the call that makes the second network answer for all."""
    invocation = subject.invocation
    for name in invocation.parameters:
        if invocation.default(name) is True:
            even = replace(subject, invocation=replace(invocation, call={**invocation.call, name: False}))
            try:
                find_guided(even, denoisers)
            except RecordingError:
                continue
            return RecordingError(f"{error}; give {name}=False in the call")
    return RecordingError(f"{error}")


_NAMES = ("positive", "negative", "further")


def _with_formula(
    report: GuidanceReport,
    weighing: Weighing | None,
    subject: Subject,
    denoisers: Denoisers,
    found: Guided,
    guided: GuidedCall,
) -> GuidanceReport:
    """The report with what two answers at one scale have: (n, p), and of several networks those of each."""
    if weighing is not None and weighing.follows and weighing.follows[0] is not None:
        report = replace(report, offset=weighing.follows[0][1])
    if weighing is not None and len(weighing.scales) == 1 and not weighing.rescaled:
        report = replace(report, formula=(1 - weighing.scales[0], weighing.scales[0]))
    if denoisers.visits is not None:
        fit = FormulaFit(denoisers, guided, found.scale)
        off = (found.name, found.off)
        formulas, scales = expert_guidance(subject, fit, denoisers.visits, found.pieces, off)
        report = replace(report, expert_formulas=formulas, expert_scales=scales)
    return report


def _positive(subject: Subject, denoisers: Denoisers, found: Guided, embedded: set[str], told: Told) -> int:
    """Which of a guided step's answers is the positive one.

    The one that is told what the network is told without guidance, what is drawn apart, and what it is told in more
    than that (padding, and its mask); if that does not tell, the one that another prompt changes.

    Raises:
        RecordingError: neither tells.
    """
    drawn = {path.split(".")[0].split("[")[0] for path in told.draws}
    for padded in (False, True):
        for ignored in (embedded, embedded | drawn):
            matches = [same_conditioning(piece, denoisers.unguided, ignored, padded=padded) for piece in found.pieces]
            if matches.count(True) == 1:
                return matches.index(True)
    item = subject.invocation.item
    if isinstance(item.subject, str):
        other = Item({**item.arguments, PROMPT: "two red boats" if item.subject != "two red boats" else "a hill"})
        pieces = denoisers.pieces(_first(subject, found.changes, other))
        moved = [not same_conditioning(a, b, set()) for a, b in zip(found.pieces, pieces, strict=True)]
        if moved.count(True) == 1:
            return moved.index(True)
    raise RecordingError(
        f"which of the {len(found.pieces)} answers of a guided step of {subject} is the positive one was not seen: "
        f"switch the guidance off in the call, or {ANOTHER}"
    )


def _first(subject: Subject, changes: dict[str, Any], item: Item | None = None) -> Step:
    return subject.run(_STEPS, None if item is None else [item], changes, steps=1).steps[0]


def _pictures(subject: Subject, denoisers: Denoisers, found: Guided, order: tuple[int, ...]) -> tuple[str, ...]:
    """For each answer beside the positive one in words what it is told of the item's picture."""
    item, other = subject.invocation.item, subject.invocation.other
    pieces = denoisers.pieces(_first(subject, found.changes, with_pictures_of(item, other)))
    moved = [moved_paths(a.arguments(), b.arguments()) for a, b in zip(found.pieces, pieces, strict=True)]
    words = []
    for number in order[1:]:
        missing = sorted(moved[order[0]] - moved[number])
        if not missing:
            words.append("the item's picture")
        elif all(_zero(found.pieces[number], path) for path in missing):
            words.append(f"zeros in the place of the picture ({', '.join(missing)})")
        else:
            words.append(f"another picture, or none, in {', '.join(missing)}")
    return tuple(words)


def _zero(piece: Conditioning, path: str) -> bool:
    """Whether a leaf is a tensor of zeros."""
    leaf = dict(leaves(piece.tree)).get(path)
    return isinstance(leaf, Leaf) and isinstance(leaf.value, Tensor) and not bool(leaf.value.any())
