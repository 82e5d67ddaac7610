"""The proof: own calls of the network against what the pipeline hands to its scheduler, on samples it never saw before.

The observed `scheduler.step` returns fresh random samples, in a run of another length than the recording's. What the
pipeline then hands to the next `scheduler.step` must be what the recipe computes at that sample and that time.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.conditioning.conditioning import Conditioning, mark, remark
from fewstep.recording.call.items import with_pictures_of
from fewstep.recording.errors import RecordingError
from fewstep.recording.guidance.guided import another_item
from fewstep.recording.loop.call_parts import without_sample
from fewstep.recording.pipeline import evaluating
from fewstep.recording.proof.guided import guided_errors
from fewstep.recording.proof.items import guided_item_errors, item_errors
from fewstep.recording.proof.runs import (
    STEPS,
    against_scheduler,
    each,
    own_calls,
    own_conditioning,
    relative_error,
    run,
    steps_of,
    times,
)
from fewstep.recording.recorded import Recorded
from fewstep.recording.watch.observation import Observation, Step
from fewstep.recording.watch.shake import shaken

# Relative changes below this count as none: rounding alone makes 1e-7.
_NO_REACTION = 1e-4


@dataclass(frozen=True)
class Check:
    """One comparison: what, the largest relative error, and what is allowed."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Proof:
    """The comparisons of a proof that held.

    Attributes:
        checks: what was compared, on the weights as they are and, where they hide something, on shaken ones.
        warnings: what the network does not react to, and what could not be compared.
        shaken: whether the proof was repeated on shaken weights.
        swapped: the error that another item's pictures make, on the weights as they are; None: nobody was told any.
    """

    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    shaken: bool
    swapped: float | None = None

    def worst(self) -> float:
        """The largest relative error of all checks."""
        return max(check.error for check in self.checks)

    def describe(self) -> list[str]:
        """One line per check, then the warnings."""
        lines = [f"{c.name}: {c.error:.1e} (at most {c.tolerance:.0e})" for c in self.checks]
        if self.swapped is not None:
            lines.append(f"told another item's pictures it is off by {self.swapped:.1e}, so these would show")
        return lines + [f"warning: {text}" for text in self.warnings]


def prove(recording: Recorded, seed: int = 0) -> Proof:
    """Run the proof; see `Recording.prove`."""
    with evaluating(*_networks(recording)):
        return _prove(recording, seed)


def _prove(recording: Recorded, seed: int) -> Proof:
    notes: list[str] = []
    checks, swapped = _checks(recording, seed, notes, "")
    ignored = _ignored(recording, seed)
    if ignored:
        text = (
            f"the answer of {' or '.join(ignored)} does not change with {_any_of(ignored)}: are its weights untrained? "
            "They could hide a mistake, so the proof was repeated on shaken weights"
        )
        warnings.warn(text, stacklevel=4)
        notes.append(text)
        with shaken(*_networks(recording), seed=seed):
            checks += _checks(recording, seed + 1, notes, "shaken weights, ")[0]
            still = _ignored(recording, seed)
        if still:
            notes.append(f"even with shaken weights it does not change with {_any_of(still)}")
    failed = [check for check in checks if not check.holds]
    if failed:
        worst = max(failed, key=lambda check: check.error if check.error == check.error else float("inf"))
        raise RecordingError(
            f"the recording of {type(recording.pipeline).__name__} failed its proof: {worst.name} differs by "
            f"{worst.error:.2g} relative (at most {worst.tolerance:.0e}); it must not be trained on, please report it"
        )
    return Proof(tuple(checks), tuple(dict.fromkeys(notes)), bool(ignored), swapped)


def tolerance(recording: Recorded) -> float:
    """What design allows for one call at the same batch shape: by dtype and device, relative."""
    if recording.dtype in (torch.bfloat16, torch.float16):
        return 2e-2
    return 1e-6 if next(recording.network.parameters()).device.type == "cpu" else 1e-3


def _checks(recording: Recorded, seed: int, notes: list[str], prefix: str) -> tuple[list[Check], float | None]:
    """The comparisons, and with items the error that other pictures make."""
    item = recording.invocation.item
    allowed = tolerance(recording)
    single, told = run(recording, [item], seed, x0=True), own_conditioning(recording)
    checks = [
        Check(f"{prefix}unguided, one sample", _unguided_error(recording, single, told), allowed),
        Check(f"{prefix}mixed times in one batch", _mixed_error(recording, single), allowed),
    ]
    x0_error = against_scheduler(recording, single)
    if x0_error is None:
        notes.append("the scheduler gives no clean sample to compare x0 with")
    else:
        checks.append(Check(f"{prefix}x0 against the scheduler's", x0_error, max(1e-5, allowed)))
    if recording.conditional == "item":
        errors = item_errors(recording, single, told, seed + 1)
        checks.append(Check(f"{prefix}unguided, another item and draw", errors.one, allowed))
        if errors.two is None:
            notes.append("the two items of the recording cannot form one batch, so they were compared one by one")
        else:
            checks.append(Check(f"{prefix}unguided, two items in one call", errors.two, max(5e-6, allowed)))
        guided = guided_item_errors(recording, seed + 2)
        checks += [Check(prefix + name, error, max(1e-5, allowed)) for name, error in guided.items()]
        return checks, errors.swapped
    return checks + _pair_checks(recording, told, seed, notes, prefix), None


def _pair_checks(recording: Recorded, told: Conditioning, seed: int, notes: list[str], prefix: str) -> list[Check]:
    """The comparisons with the pipeline's own call of two prompts or labels, and with its guided calls; one is told."""
    item, other = recording.invocation.item, another_item(recording.invocation)
    allowed = tolerance(recording)
    pair = run(recording, [item, other], seed + 1)
    checks = [
        Check(
            f"{prefix}unguided, two samples",
            _unguided_error(recording, pair, _pair_conditioning(recording, pair, [item, other])),
            allowed,
        )
    ]
    guided = recording.guided
    if guided is None:
        return checks
    if recording.guidance.calls == 1 and not Conditioning.compatible(*each(recording, [item, other])):
        notes.append(
            "the pipeline pads its negative to the length of each prompt; fewstep keeps the one recorded beside "
            f"{item!r} (record with a prompt of typical length)"
        )
    for items, words in (([item], "one sample"), ([item, other], "two samples")):
        try:
            seen = run(recording, items, seed + 2, changes=guided.changes)
        except RecordingError as error:
            if len(items) == 1:
                raise
            notes.append(f"guided with two prompts, the pipeline itself fails and was not compared ({error})")
            continue
        errors = guided_errors(recording, guided, seen, told if len(items) == 1 else None, notes)
        checks += [Check(f"{prefix}guided, {words}{part}", error, allowed) for part, error in errors.items()]
    return checks


def _call_conditioning(recording: Recorded, step: Step, rows: int) -> Conditioning:
    call = step.calls[-1]
    return remark(without_sample(call, recording.recipe), recording.marked, rows)


def _pair_conditioning(recording: Recorded, pair: Observation, items: list[Any]) -> Conditioning:
    """The conditioning of the pipeline's own call with two prompts, taken apart and put together again.

    It is not compared with each prompt's own: pipelines pad to the longest prompt of a batch.
    """
    try:
        whole = _call_conditioning(recording, pair.steps[0], len(items))
    except ValueError:
        # Together they have other arguments than alone (a mask); how these depend on the batch, four samples show.
        four = recording.subject.run(STEPS, items * 2, before=recording.component).pending[-1]
        two = pair.steps[0].calls[-1]
        tree = mark(without_sample(two, recording.recipe), without_sample(four, recording.recipe), samples=len(items))
        whole = Conditioning(tree, len(items))
    return Conditioning.cat([whole.select([i]) for i in range(len(items))])


def _unguided_error(recording: Recorded, seen: Observation, conditioning: Conditioning) -> float:
    return max(
        relative_error(own(step.network_input, conditioning), step.model_output)
        for step, own in own_calls(recording, seen)
    )


def _mixed_error(recording: Recorded, seen: Observation) -> float:
    """Two samples at two times in one batch against the same batch at either time; for each expert."""
    steps = seen.steps
    pairs = {recording.component: [1, 2]}
    if recording.visits is not None:
        live = sorted(recording.visits.live)[1:]
        pairs = {
            c: [i for i in live if recording.expert_at(steps[i].timestep).component == c][:2]
            for c in recording.components
        }
    return max(_mixed_pair_error(recording, steps, pairs[e.component], e.network) for e in recording.experts)


def _mixed_pair_error(recording: Recorded, steps: list[Step], pair: list[int], network: nn.Module) -> float:
    i, k = pair
    early, late = steps[i], steps[k]
    x = torch.cat([early.network_input, late.network_input])
    conditioning = _call_conditioning(recording, early, 1).select([0, 0])
    at = torch.tensor([early.timestep, late.timestep], dtype=torch.float64)
    ends = [steps[n + 1].timestep if n + 1 < len(steps) else 0.0 for n in (i, k)]
    following = torch.tensor(ends, dtype=torch.float64)

    def call(order: list[int]) -> Tensor:
        with torch.no_grad():
            return recording.recipe.call(network, x, at[order], conditioning, next_timestep=following[order])

    mixed = call([0, 1])
    unmixed = torch.stack([call([0, 0])[0], call([1, 1])[1]])
    return relative_error(mixed, unmixed)


def _ignored(recording: Recorded, seed: int) -> dict[str, list[str]]:
    """Component -> what it does not react to, where there is such: the sample, the time and the prompt (or label)."""
    seen = run(recording, [recording.invocation.item], seed)
    found = {}
    for expert in recording.experts:
        steps = steps_of(recording, expert, seen)
        found[expert.component] = _ignored_by_network(recording, steps[0], steps[-1], expert.network)
    return {component: words for component, words in found.items() if words}


def _any_of(ignored: dict[str, list[str]]) -> str:
    return " or ".join(dict.fromkeys(word for words in ignored.values() for word in words))


def _ignored_by_network(recording: Recorded, first: Step, second: Step, network: nn.Module) -> list[str]:
    x, conditioning = first.network_input, _call_conditioning(recording, first, 1)
    # A velocity made of x and an x0 follows the sample and the time by itself; what counts is the network's part.
    recipe = replace(recording.recipe, output=replace(recording.recipe.output, relation="same"))

    def answer(x: Tensor, step: Step, conditioning: Conditioning) -> Tensor:
        following = times(step.timestep / 2, 1)
        with torch.no_grad():
            return recipe.call(network, x, times(step.timestep, 1), conditioning, next_timestep=following)

    base = answer(x, first, conditioning)
    reactions = {
        "the sample": answer(second.network_input, first, conditioning),
        "the time": answer(x, second, conditioning),
    }
    if recording.conditional == "item":
        item, other = recording.invocation.item, recording.invocation.other
        reactions["the picture"] = answer(x, first, each(recording, [with_pictures_of(item, other)])[0])
    elif recording.conditional is not None:
        name, other = recording.conditional, another_item(recording.invocation)
        reactions[f"the {name}"] = answer(x, first, each(recording, [other])[0])
    return [name for name, value in reactions.items() if relative_error(value, base) < _NO_REACTION]


def _networks(recording: Recorded) -> list[nn.Module]:
    return [expert.network for expert in recording.experts]
