"""The proof of a guided step of prompts or labels: each of its answers, and the sum that the pipeline makes of them."""

from __future__ import annotations

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.conditioning.tree import Leaf
from fewstep.recording.guidance.formula import GuidedCall
from fewstep.recording.loop.call_parts import answers, network_calls, repeated, without_sample
from fewstep.recording.proof.runs import own_calls, relative_error
from fewstep.recording.recorded import Recorded
from fewstep.recording.watch.observation import NetworkCall, Observation


def guided_errors(
    recording: Recorded, guided: GuidedCall, seen: Observation, told: Conditioning | None, notes: list[str]
) -> dict[str, float]:
    """Errors of the guided run's separate answers, and of their sum where it was understood.

    Args:
        recording: of prompts or labels.
        guided: the call.
        seen: its run, of one item or two.
        told: the conditioning of the one; None where they are two.
        notes: of what could not be compared; it is added to.
    """
    recipe, report = recording.recipe, recording.guidance
    parts: dict[str, float] = {}
    batch = 2 if told is None else 1
    formulas = dict(zip(recording.components, report.expert_formulas or [report.formula], strict=True))
    for step, own in own_calls(recording, seen):
        formula = formulas[recording.expert_at(step.timestep).component]
        calls = network_calls(step, recording.components)
        found = torch.cat(answers(calls, recipe, step, batch))
        got = []
        alone = len(found) == batch  # this expert is not guided
        for i, call in enumerate(calls):
            rows = len(call.arguments[recipe.sample.argument])
            x = repeated(step.network_input, rows, batch)
            piece = guided.positive if alone else i
            got.append(own(x, _told(recording, guided, call, piece, rows, told, notes)))
        result = torch.cat(got)
        parts[""] = max(parts.get("", 0.0), relative_error(result, found))
        if formula is not None and report.formula_scale is not None:
            n, p = formula
            if alone:
                negative = positive = result
            else:
                negative, positive = (result[k * batch : (k + 1) * batch] for k in (guided.negative, guided.positive))
            wanted = step.model_output[:batch]
            scale = max(abs(n), abs(p)) * max(positive.abs().max().item(), negative.abs().max().item(), 1e-30)
            error = (n * negative + p * positive - wanted).abs().max().item() / scale
            parts[", combined"] = max(parts.get(", combined", 0.0), error)
        elif report.rescaling is not None and report.weighing is not None and not alone:
            answered = [result[k * batch : (k + 1) * batch] for k in guided.order]
            error = relative_error(report.weighing.combined(answered), step.model_output[:batch])
            parts[", combined"] = max(parts.get(", combined", 0.0), error / max(report.weighing.scales))
    if report.linear is False and report.rescaling is None:
        notes.append("the pipeline's guided sum is not linear, so only its parts were compared")
    return parts


def _told(
    recording: Recorded,
    guided: GuidedCall,
    call: NetworkCall,
    index: int,
    rows: int,
    positive: Conditioning | None,
    notes: list[str],
) -> Conditioning:
    """What the guided call's own pieces were told; for one prompt: this recording's own positive and negative."""
    # Passed on whole, not taken apart: beside longer prompts it may hold other arguments (a mask) than alone.
    whole = Conditioning({n: Leaf(value) for n, value in without_sample(call, recording.recipe).items()}, rows)
    if positive is None:
        return whole
    pieces = range(rows) if rows > 1 else [index]
    negative = recording.negative()
    assert negative is not None  # it was recorded with the guided call
    own = {guided.negative: negative, guided.positive: positive}
    try:
        return Conditioning.cat([own[piece] for piece in pieces])
    except ValueError:
        notes.append(
            "the pipeline pads a prompt to its negative's length; alone, as users without guidance do, it does not"
        )
        return whole
