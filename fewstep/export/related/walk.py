"""The walk of a student's relatives: image to image, inpainting, video to video, control networks.

A relative starts somewhere on the student's grid, where its strength says, and what it makes of the strength is its own
arithmetic. So each is run stock, with stand-ins for the networks, at strengths between which nothing changes: how many
calls it makes and from which time, whether the picture reaches the network at all, and whether the scheduler still does
what the student was trained for. What holds is written into ``fewstep.json``.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin

from fewstep.errors import one_line
from fewstep.export.errors import ExportError
from fewstep.export.related.call import STRENGTH, call_of, default_strength, picture_arguments, pictures, task_of
from fewstep.export.related.classes import made_of, missing_package, related_classes, text_unrepaired
from fewstep.export.related.ranges import Outcome, Range, nearest, ranges
from fewstep.export.related.stubs import Heard, StandIns, remembering, stood_in
from fewstep.export.related.told import Form, OtherTaskError, form_of, share, starts_from
from fewstep.export.walk.check import follow
from fewstep.networks.adapters import on_the_same_weights
from fewstep.recording import RecordingError
from fewstep.recording.pipeline import find_scheduler, modules_of, with_parts
from fewstep.recording.watch.quiet import only_errors

if TYPE_CHECKING:
    from fewstep.export.walk.plan import StudentPlan
    from fewstep.export.walk.trace import Trace
    from fewstep.recording import Recording

# Of what the network is told, the part that another picture changes; at less the picture cannot be seen in the result.
# (A table's last entry holds 0.07 of the picture or less, and a flow's first time none.)
_LEAST_SHARE = 0.1
# Letters of a reason in another library's words, some of which print whole configurations.
_LONGEST = 160
# A walk has two strengths a step: all counts of up to so many steps are walked, above them powers of two and the last.
_ALL_UP_TO = 4
# What was walked in this process.
_WALKED: dict[str, dict[str, Any]] = {}


def walk_relatives(recording: Recording, plan: StudentPlan) -> dict[str, Any]:
    """What holds for every pipeline class of the family that takes a picture, by class name, as JSON can hold it.

    A class has a ``task``, and either ``why_not`` or ``images`` (its picture arguments), ``call`` (what is filled in)
    and ``counts``: at each of :func:`walked_counts` the ranges of strength, each with ``calls``, its first ``timestep``
    and the same as a ``time`` (1 is noise), or with ``why_not``; besides a ``remark``, and a package that it ``needs``.

    Args:
        recording: of the teacher.
        plan: of the student.
    """
    stock = type(recording.pipeline)
    if not stock.__module__.startswith("diffusers.pipelines.") or recording.conditional != "prompt":
        return {}
    found = list(related_classes(stock))
    if not found:
        return {}
    # A student is often written twice, as a pipeline and as a LoRA; its weights have no part in a walk.
    key = _key(recording, plan)
    if key not in _WALKED:
        _WALKED[key] = _walked(recording, plan, found)
    return copy.deepcopy(_WALKED[key])


def walked_counts(plan: StudentPlan) -> list[int]:
    """The step counts at which a student's relatives are walked, of those at which it is right itself."""
    return [n for n in plan.counts if n <= _ALL_UP_TO or n & (n - 1) == 0 or n == plan.steps]


def _key(recording: Recording, plan: StudentPlan) -> str:
    """All that a walk depends on, as text: classes, configurations, the call and the grid."""

    def described(part: Any) -> tuple[str, Any]:
        return type(part).__name__, dict(part.config) if isinstance(part, ConfigMixin) else None

    pipeline, networks = recording.pipeline, tuple(recording.components)
    parts = {name: described(part) for name, part in pipeline.components.items()}
    moves = described(plan.scheduler), plan.call, plan.renoise, plan.gamma, plan.grids, plan.initial_scale
    asked = recording.invocation.item, recording.call, str(recording.dtype)
    return json.dumps([described(pipeline), networks, parts, moves, asked], default=str, sort_keys=True)


def _walked(recording: Recording, plan: StudentPlan, found: list[type]) -> dict[str, Any]:
    stock = type(recording.pipeline)
    try:
        walker = _Walker(recording, plan, StandIns.of(recording))
    except (RecordingError, NotImplementedError, RuntimeError) as error:  # the way to its pictures cannot be read
        why = f"the student's way to its pictures was not understood: {one_line(error)}"
        return {kind.__name__: {"task": task_of(kind, stock), "why_not": why} for kind in found}
    with only_errors(), remembering(walker.student, *recording.components, recording.codec.decoder or ""):
        return {kind.__name__: {"task": task_of(kind, stock), **walker.of(kind)} for kind in found}


class _Walker:
    """Walks one relative after the other."""

    def __init__(self, recording: Recording, plan: StudentPlan, stand_ins: StandIns) -> None:
        self.recording, self.plan, self.stand_ins = recording, plan, stand_ins
        # Some classes change the parts that they are made of; twins on the same weights keep the teacher as it is.
        twins = {name: on_the_same_weights(module).eval() for name, module in modules_of(recording.pipeline).items()}
        self.student = with_parts(recording.pipeline, **twins, **{find_scheduler(recording.pipeline): plan.scheduler})
        arguments = recording.invocation.arguments([recording.invocation.item], plan.steps)
        kept = {name: value for name, value in arguments.items() if name not in recording.call}
        heard = Heard()
        with stood_in(self.student, stand_ins, 0, heard):
            self._follow(self.student, {**kept, **plan.call}, checked=True)
        self.own = self._form(heard)

    def of(self, kind: type) -> dict[str, Any]:
        """What holds for a class."""
        try:
            pipeline = made_of(self.student, kind)
            for network in modules_of(pipeline).values():
                network.eval()  # once, and not at every run anew
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a constructor raises about foreign parts is why the class is not for them
            return {"why_not": _shortened(one_line(error))}
        call, remarks = call_of(kind, type(self.student), self.plan.call), set[str]()
        strength = default_strength(kind)

        def run(count: int, strength: float | None) -> Outcome:
            arguments = {**call, "num_inference_steps": count}
            return self._outcome(pipeline, arguments if strength is None else arguments | {STRENGTH: strength}, remarks)

        try:
            rows = {
                count: [Range(0, 1, False, True, run(count, None))]
                if strength is None
                else ranges(count, functools.partial(run, count))
                for count in walked_counts(self.plan)
            }
        except OtherTaskError as error:
            return {"why_not": one_line(error)}
        outcomes = [row.outcome for count in rows for row in rows[count]]
        if all(outcome.why_not is not None for outcome in outcomes):
            # At the highest strength: what is wrong there is not that too little of the way is left for a step.
            return {"why_not": _in_full(rows[self.plan.steps][-1].outcome)}
        if strength is not None:
            call[STRENGTH] = nearest(rows[self.plan.steps], strength) or strength
        counts = {str(count): [row.as_json() for row in rows[count]] for count in rows}
        found = {"images": picture_arguments(kind), "call": call, "counts": counts}
        found |= {"remark": "; ".join(sorted(remarks))} if remarks else {}
        return found | ({"needs": package} if (package := missing_package(kind)) is not None else {})

    def _outcome(self, pipeline: Any, call: dict[str, Any], remarks: set[str]) -> Outcome:
        """What is done under a call.

        Raises:
            OtherTaskError: something that the network was not trained for, whatever the strength.
        """
        heard = Heard()
        try:
            seen, times = self._run(pipeline, call, heard, picture=1, whole=True)
        except torch.OutOfMemoryError:
            raise
        except ExportError as error:
            if heard.of(*self.recording.components):  # what it asks of its network says more than what it then does
                self._form(heard).other_than(self.own)
            return Outcome(why_not=one_line(error))
        except Exception as error:  # whatever a pipeline raises at a strength is the reason not to use it there
            if heard.of(*self.recording.components):
                self._form(heard).other_than(self.own)
            too_weak = call.get(STRENGTH, 1.0) * call["num_inference_steps"] < 1
            why = "it makes no step" if too_weak else "it does not run"
            return Outcome(why_not=why, detail=_shortened(one_line(error)))
        if not seen.steps:
            return Outcome(why_not="it makes no step")
        grid = self.plan.grids[call["num_inference_steps"]]
        strange = [f"{t:.4g}" for t in times if not any(math.isclose(t, own, abs_tol=1e-4) for own in grid)]
        if strange:
            return Outcome(why_not=f"it visits the time {', '.join(strange)}, which is not on the student's grid")
        remarks |= self._form(heard).other_than(self.own)
        if len(heard.of(*self.recording.components)) != len(seen.steps):
            raise OtherTaskError("it asks its network more than once a step")
        start = starts_from(seen, times[0], self.stand_ins, self.plan.initial_scale)
        if start is None:
            return Outcome(why_not="it starts from something else than its picture, or noise, at its first time")
        at_top = math.isclose(times[0], grid[0], abs_tol=1e-4)
        if at_top and start < _LEAST_SHARE and self._heeded(pipeline, call) < _LEAST_SHARE:
            return Outcome(why_not="it ignores the picture, which is all noise there")
        return Outcome(len(seen.steps), seen.steps[0].timestep, round(times[0], 6))

    def _heeded(self, pipeline: Any, call: dict[str, Any]) -> float:
        """The share of what the networks are told that another picture changes."""
        one, two = Heard(), Heard()
        for number, heard in ((1, one), (2, two)):
            self._run(pipeline, call, heard, picture=number, whole=False)
        return share(one, two)

    def _run(
        self, pipeline: Any, call: dict[str, Any], heard: Heard, *, picture: int, whole: bool
    ) -> tuple[Trace, tuple[float, ...]]:
        shown = pictures(type(pipeline), self.stand_ins.pixels, picture, whole=whole)
        generator = torch.Generator().manual_seed(0)
        arguments = {"prompt": self.recording.invocation.item, "output_type": "latent", "generator": generator}
        with stood_in(pipeline, self.stand_ins, picture, heard), text_unrepaired(type(pipeline)):
            return self._follow(pipeline, {**arguments, **shown, **call}, checked=whole)

    def _follow(self, pipeline: Any, arguments: dict[str, Any], *, checked: bool) -> tuple[Trace, tuple[float, ...]]:
        recording = self.recording

        def component_at(timestep: float) -> str:
            return recording.expert_at(timestep).component

        return follow(
            pipeline,
            arguments,
            recording.schedule,
            recording.prediction_type,
            self.plan.move,
            component_at,
            checked=checked,
        )

    def _form(self, heard: Heard) -> Form:
        times = frozenset(rule.argument for rule in self.recording.recipe.times)
        return form_of(heard.of(*self.recording.components)[0], times, self.recording.recipe.sample.argument)


def _in_full(outcome: Outcome) -> str:
    return f"{outcome.why_not} ({outcome.detail})" if outcome.detail else str(outcome.why_not)


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST].rstrip()} ..."
