"""The proof of a network that is told pictures: with an item and a seed that its rules were not learnt from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.recording.call.items import with_pictures_of
from fewstep.recording.loop.call_parts import answers, network_calls
from fewstep.recording.proof.runs import own_calls, relative_error, run
from fewstep.recording.recorded import Recorded
from fewstep.recording.watch.observation import Observation

# The seed of the draws; the recording's is 0.
_DRAW = 1


@dataclass(frozen=True)
class ItemErrors:
    """The relative errors of own calls against the pipeline's, each item told alone by the pipeline.

    Attributes:
        one: of an item that the rules were not learnt from, in one call.
        two: of two items in one call; None where they cannot form one batch.
        swapped: of one item that is told another's pictures: what a mistake would make.
    """

    one: float
    two: float | None
    swapped: float


def item_errors(recording: Recorded, own: Observation, told: Conditioning, seed: int) -> ItemErrors:
    """Compare own calls with the pipeline's run of the recording's other item, drawn anew.

    Args:
        recording: of items.
        own: the pipeline's run of the recording's own item, with
        told: what its network was told there.
        seed: of the fresh samples of the other item's run.
    """
    item, other = recording.invocation.item, recording.invocation.other
    seen = run(recording, [other], seed, draw=_DRAW)
    others, swapped = recording.draw_each([other, with_pictures_of(other, item)], _DRAW)
    one = _error(recording, seen, others)
    wrong = _error(recording, seen, swapped)
    if not Conditioning.compatible(told, others):
        # Their prompts may be of other lengths: the same prompt with the other pictures.
        alike = with_pictures_of(item, other)
        seen, others = run(recording, [alike], seed, draw=_DRAW), recording.draw_each([alike], _DRAW)[0]
    two = _together(recording, [own, seen], [told, others]) if Conditioning.compatible(told, others) else None
    return ItemErrors(one, two, wrong)


def _error(recording: Recorded, seen: Observation, conditioning: Conditioning) -> float:
    calls = own_calls(recording, seen)
    return max(relative_error(own(step.network_input, conditioning), step.model_output) for step, own in calls)


def _together(recording: Recorded, runs: list[Observation], told: list[Conditioning]) -> float:
    """The error of both items in one call against the pipeline's single ones."""
    both = Conditioning.cat(told)
    errors = []
    for (one, own), (two, _) in zip(*(own_calls(recording, seen) for seen in runs), strict=True):
        answer = own(torch.cat([one.network_input, two.network_input]), both)
        wanted = torch.cat([one.model_output, two.model_output])
        errors.append(relative_error(answer, wanted))
    return max(errors)


def guided_item_errors(recording: Recorded, seed: int) -> dict[str, float]:
    """The errors of each answer, and of their weighed sum, in a guided run of the item that nothing was learnt from.

    {} without guidance. Of several networks the answers alone are compared, as each weighs them in its own way.
    """
    guided, weighing = recording.guided, recording.guidance.weighing
    if guided is None:
        return {}
    other, errors = recording.invocation.other, {"guided, each answer": 0.0}
    seen = run(recording, [other], seed, changes=guided.changes, draw=_DRAW)
    told = list(recording.guided_each([other], _DRAW)[0])
    if recording.told is not None and not recording.told.draws:
        told[0] = recording.draw_each([other], _DRAW)[0]
    for step, own in own_calls(recording, seen):
        theirs = answers(network_calls(step, recording.components), recording.recipe, step)
        ours = [own(step.network_input[:1], conditioning) for conditioning in told]
        pairs = list(zip(ours, (theirs[number] for number in guided.order), strict=True))
        errors["guided, each answer"] = max(errors["guided, each answer"], *(relative_error(*pair) for pair in pairs))
        if weighing is not None and len(recording.experts) == 1:
            error = relative_error(weighing.combined(ours), step.model_output[:1])
            errors["guided, combined"] = max(errors.get("guided, combined", 0.0), error)
    return errors
