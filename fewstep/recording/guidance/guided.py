"""Guidance: the value that switches it off, the negative conditioning, and the pipeline's own formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.call.invocation import Invocation
from fewstep.recording.errors import ANOTHER, RecordingError
from fewstep.recording.guidance.formula import NO_RESPONSE, FormulaFit, GuidedCall, expert_guidance
from fewstep.recording.guidance.report import GuidanceReport
from fewstep.recording.guidance.runs import guided_runs, scale_arguments
from fewstep.recording.guidance.weighing import Weighing, weigh
from fewstep.recording.loop.call_parts import equal, in_types_of, same_conditioning, without_sample
from fewstep.recording.loop.denoisers import Denoisers
from fewstep.recording.rules.fit import fit_sample
from fewstep.recording.watch.observation import Step
from fewstep.recording.watch.shake import shaken
from fewstep.recording.watch.subject import Subject

_STEPS = 4


def unguided_step(step: Step, component: str, *, beside: bool = False) -> bool:
    """Whether a step at one sample holds one network call of exactly one sample.

    Args:
        step: of the pipeline.
        component: the network.
        beside: pictures stand beside the sample in the network's arguments, so that the answers count.
    """
    if beside:
        return _answers_once(step, component)
    if sum(call.component == component for call in step.calls) != 1 or step.network_input.shape[0] != 1:
        return False
    try:
        fit_sample(component, [step])
    except RecordingError:
        return False
    return True


def switch_off(subject: Subject) -> tuple[Subject, str]:
    """The subject with guidance off, so that its network is called once per step, and the network's component name.

    The call as it is comes first (no guidance, or an embedded one), then each guidance scale at 1.0 and at 0.0.

    Raises:
        RecordingError: no such value, or no network.
    """
    scales = scale_arguments(subject.invocation)
    attempts: list[dict[str, Any]] = [{}]
    attempts += [{name: off} for name in scales for off in (1.0, 0.0)]
    failure: RecordingError | None = None
    single: Step | None = None
    for changes in attempts:
        try:
            seen = subject.run(_STEPS, changes=changes, steps=1)
        except RecordingError as error:
            # A pipeline may refuse a value of its scale; what it says matters only if every value fails.
            failure = failure or error
            continue
        step = first_step(subject, seen.steps)
        component = step.calls[-1].component
        if unguided_step(step, component, beside=subject.invocation.conditional == "item"):
            return replace(subject, off=changes), component
        if single is None and _answers_once(step, component):
            single = step
    if single is not None:
        fit_sample(single.calls[-1].component, [single])  # raises, and says what is wrong with the sample
    if failure is not None:
        raise failure
    _refuse_called_before(subject, attempts, component)
    guider = next((name for name, part in subject.pipeline.components.items() if hasattr(part, "guidance_scale")), None)
    why, where = "", "switch the further answers off in the call"
    if guider is not None:
        why = f", as its {guider} asks, which no argument of the call switches off"
        where = f"give the pipeline a {guider} whose guidance_scale is 1"
    raise RecordingError(
        f"{subject} calls {component} for more than one answer per step whatever its guidance scale "
        f"({', '.join(scales) or 'it has none'}){why}; this cannot be recorded: {where}, or {ANOTHER}"
    )


def _refuse_called_before(subject: Subject, attempts: list[dict[str, Any]], component: str) -> None:
    """Raise where a network is called before the first step, too: it keeps what it is told of a picture."""
    for changes in attempts:
        try:
            steps = subject.run(_STEPS, changes=changes, steps=2).steps
        except RecordingError:
            continue
        if len(steps) > 1 and _answers_once(steps[1], component):
            raise RecordingError(
                f"{subject} calls {component} before its first step, too (does it keep what it is told of a picture?), "
                f"which cannot be recorded: {ANOTHER}"
            )


def _answers_once(step: Step, component: str) -> bool:
    """Whether a step at one sample asks its network for one answer, wherever the sample went."""
    outputs = [call.output for call in step.calls if call.component == component]
    return len(outputs) == 1 and _answered(outputs[0]) == 1 == step.network_input.shape[0]


def _answered(output: Any) -> int:
    """For how many samples a network answered."""
    if isinstance(output, list) or not isinstance(output, dict | tuple):
        return len(output)
    return _answered(next(iter(output.values())) if isinstance(output, dict) else output[0])


def first_step(subject: Subject, steps: list[Step]) -> Step:
    """The first step, checked to hold a network call."""
    if not steps:
        raise RecordingError(f"{subject} made no step of its scheduler, so there is nothing to distil: {ANOTHER}")
    if not steps[0].calls:
        raise RecordingError(
            f"{subject} called none of its networks before scheduler.step: it has no denoiser to distil: {ANOTHER}"
        )
    return steps[0]


def embedded_paths(subject: Subject, denoisers: Denoisers) -> set[str]:
    """The network's arguments that follow a guidance scale with guidance off."""
    paths: set[str] = set()
    plain = denoisers.unguided.arguments()
    for name in scale_arguments(subject.invocation):
        value = subject.invocation.default(name)
        if name in subject.off or not isinstance(value, int | float):
            continue
        step = _stubbed_step(subject, denoisers, {name: value + 0.5})
        if step is not None:  # else the value switched classifier-free guidance on, or the pipeline refuses it
            other = without_sample(step.calls[-1], denoisers.recipe)
            paths |= {key for key in plain if not equal(plain[key], other.get(key))}
    return paths


def _stubbed_step(subject: Subject, denoisers: Denoisers, changes: dict[str, Any]) -> Step | None:
    """The first step with the network skipped, or None where it is no unguided one (the stub holds one sample)."""
    try:
        steps = subject.run(_STEPS, changes=changes, steps=1, stub=denoisers.stub).steps
    except RecordingError:
        return None
    recipe = denoisers.recipe
    if subject.invocation.conditional == "item":  # of which a stub answers once whatever it is asked
        calls = denoisers.calls(steps[0]) if steps else []
        return steps[0] if [len(call.arguments[recipe.sample.argument]) for call in calls] == [1] else None
    return steps[0] if steps and unguided_step(steps[0], recipe.component) else None


def record_guided(
    subject: Subject, denoisers: Denoisers, embedded: set[str]
) -> tuple[GuidanceReport, Conditioning | None, GuidedCall | None]:
    """Record two guided steps of one sample: the report, the negative conditioning, and how to repeat the call.

    Two steps, because a sum that is rescaled sample by sample looks linear in one of them. Of several experts each is
    asked, in the steps of their visits.

    Args:
        subject: with guidance off.
        denoisers: of its loop.
        embedded: their arguments that follow an embedded guidance.
    """
    found = find_guided(subject, denoisers)
    if isinstance(found, str):
        return GuidanceReport(embedded=bool(embedded), remark=found), None, None
    changes, name, steps, pieces = found.changes, found.name, found.steps, found.pieces
    if len(pieces) > 2:
        raise RecordingError(
            f"a guided step of {subject} asks its network for {len(pieces)} answers per sample, more than a "
            "positive and a negative one; switch the further guidance off in the call"
        )
    positive, certain = _find_positive(subject, denoisers, changes, pieces, embedded)
    calls = len(denoisers.calls(steps[0]))
    guided = GuidedCall(changes, (positive, 1 - positive), calls, denoisers.stub)
    fit = FormulaFit(denoisers, guided, found.scale)
    fitted, linear, offset, words = fit(steps)
    if words == NO_RESPONSE:
        with shaken(*denoisers.networks):
            fitted, linear, offset, words = fit(_guided_steps(subject, changes))
    weighing: Weighing | None = None
    if linear is False and denoisers.visits is None:
        weighing = weigh(guided_runs(subject, denoisers, changes, name, found.scale), positive)
        weighing = None if weighing is None or weighing.rescaled is None else weighing
        offset = weighing.follows[0][1] if weighing is not None and weighing.follows[0] is not None else offset
    default = subject.invocation.default(name)
    report = GuidanceReport(
        off_argument=(name, found.off),
        argument_scale=float(default) if isinstance(default, int | float) else None,
        embedded=bool(embedded),
        calls=calls,
        order="positive, negative" if positive == 0 else "negative, positive",
        formula=fitted,
        formula_scale=found.scale,
        linear=linear,
        offset=offset,
        remark=words if certain else "the prompt changes neither half, so their order was not seen",
        weighing=weighing,
    )
    if denoisers.visits is not None:
        formulas, scales = expert_guidance(subject, fit, denoisers.visits, pieces, (name, found.off))
        report = replace(report, expert_formulas=formulas, expert_scales=scales)
    return report, in_types_of(pieces[1 - positive], denoisers.unguided), guided


@dataclass(frozen=True)
class Guided:
    """A guided call of one sample.

    Attributes:
        changes: to the call with guidance off.
        name: of the argument that guides.
        scale: its value.
        off: the value that switches guidance off.
        steps: the first two.
        pieces: the conditioning of each answer in them, in the pipeline's order.
    """

    changes: dict[str, Any]
    name: str
    scale: float
    off: float
    steps: list[Step]
    pieces: list[Conditioning]


def find_guided(subject: Subject, denoisers: Denoisers) -> Guided | str:
    """A call that asks the network for several answers in a step; in words what was tried, where there is none.

    Raises:
        RecordingError: the call as it was given is guided, and fails under every scale that was tried.
    """
    failure: RecordingError | None = None
    for changes, name, scale in _guided_attempts(subject):
        try:
            steps = _guided_steps(subject, changes)
        except RecordingError as error:
            failure = failure or error  # pipelines refuse combinations (a negative prompt, a scale out of range)
            continue
        pieces = denoisers.pieces(steps[0])
        if len(pieces) < 2:
            continue
        off_value = subject.off[name] if name in subject.off else _off_value(subject, denoisers, changes, name)
        if off_value is not None:  # else another argument guides here
            return Guided(changes, name, scale, off_value, steps, pieces)
    if subject.off and failure is not None:
        raise failure  # the call was guided before, so this is not a pipeline without guidance
    return "" if failure is None else f"a guided call was tried and failed: {failure}"


def _off_value(subject: Subject, denoisers: Denoisers, changes: dict[str, Any], name: str) -> float | None:
    """The value of `name` that switches a guided call's guidance off; None when neither 1 nor 0 does."""
    for value in (1.0, 0.0):
        if _stubbed_step(subject, denoisers, {**changes, name: value}) is not None:
            return value
    return None


def _guided_attempts(subject: Subject) -> Iterator[tuple[dict[str, Any], str, float]]:
    """(changes to the call, the guiding argument, its value), the likeliest first."""
    invocation = subject.invocation
    for name in scale_arguments(invocation):
        if subject.off and name not in subject.off:
            continue
        default = invocation.default(name)
        scale = float(default) if isinstance(default, int | float) and default > 1 else 5.0
        yield {name: scale}, name, scale
        own = invocation.item.arguments if invocation.conditional == "item" else invocation.call
        given = invocation.call.get("negative_prompt", own.get("negative_prompt"))
        if "negative_prompt" in invocation.parameters and given is None:
            yield {name: scale, "negative_prompt": ""}, name, scale


def _guided_steps(subject: Subject, changes: dict[str, Any], item: Any = None) -> list[Step]:
    """The first two steps, of another prompt or label than the recording's where one is given."""
    steps = subject.run(_STEPS, None if item is None else [item], changes, steps=2).steps
    first_step(subject, steps)
    return steps


def _find_positive(
    subject: Subject, denoisers: Denoisers, changes: dict[str, Any], pieces: list[Conditioning], embedded: set[str]
) -> tuple[int, bool]:
    """Which of two pieces is the positive one, and whether that was seen.

    The one that equals the unguided recording; if that does not tell, the one that another prompt changes; and where
    another prompt changes the length of both, the one that begins or ends like the unguided recording.
    """
    unguided = denoisers.unguided
    matches = [same_conditioning(piece, unguided, embedded) for piece in pieces]
    if matches[0] != matches[1]:
        return matches.index(True), True
    others = denoisers.pieces(_guided_steps(subject, changes, another_item(subject.invocation))[0])
    moved = [not same_conditioning(a, b, set()) for a, b in zip(pieces, others, strict=True)]
    if moved[0] != moved[1]:
        return moved.index(True), True
    padded = [same_conditioning(piece, unguided, embedded, padded=True) for piece in pieces]
    if padded[0] != padded[1]:
        return padded.index(True), True
    if any(moved):
        raise RecordingError(
            "both halves of the guided call follow the prompt, so the negative one cannot be told from the positive "
            f"one: switch the guidance off in the call, or {ANOTHER}"
        )
    return 1, False


def another_item(invocation: Invocation) -> Any:
    """A prompt or label other than the recording's."""
    if invocation.conditional == "label":
        return 0 if invocation.item else 1
    return "two red boats" if invocation.item != "two red boats" else "a hill"
