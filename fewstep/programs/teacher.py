"""What a teacher is asked with: the call it is recorded at, its guidance, and the conditions."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.conditions import Conditions, read_classes, read_prompts
from fewstep.diffusion.intervals import TimedScale
from fewstep.recording import Recording
from fewstep.teachers.loading import embedded_name


class Question(Protocol):
    """The settings that say it; :class:`fewstep.config.run.RunConfig` documents them."""

    teacher: str
    prompts: str | None
    classes: str | None
    cache: str | None
    call: dict[str, Any] | None
    guidance_scale: float | None
    negative_prompt: str | None
    teacher_lora: str | None


def teacher_call(question: Question) -> dict[str, Any]:
    """The keyword arguments that the teacher is recorded with."""
    call = dict(question.call or {})
    for name in ("guidance_scale", "negative_prompt"):
        if getattr(question, name) is not None:
            call[name] = getattr(question, name)
    return call


def guidance_of(question: Question, recording: Recording) -> float | TimedScale:
    """The w of neg + w (pos - neg) that the teacher is asked with, or one for each expert that shares the time."""
    from fewstep.fashion import TEACHERS

    report = recording.guidance
    wish = question.guidance_scale
    if report.expert_scales:
        # Seen in the call, of which the wish is a part; it is meant in fewstep's own convention.
        less = report.offset or 0.0 if wish is not None else 0.0
        scales = tuple(1.0 if w == 1.0 else w - less for w in report.expert_scales)
        return scales[0] if len(set(scales)) == 1 else TimedScale(recording.intervals, scales)
    # A network that is told its guidance got it with the conditioning; what is left is a second, explicit guidance.
    if wish is not None and not report.embedded:
        return wish
    if wish is None and (known := embedded_name(question.teacher)):
        return TEACHERS[known].guidance_scale
    if report.off_argument is None or report.argument_scale is None:
        return 1.0
    return report.argument_scale + (report.offset or 0.0)


def conditions_of(
    question: Question, recording: Recording, device: torch.device | str, *, progress: bool = False
) -> tuple[Conditions, Conditioning | None]:
    """What is generated for, and the teacher's negative: encoded now, or read from a cache.

    An embedded teacher has prompts of its own.

    Raises:
        UserError: they are not what the teacher takes.
    """
    if question.cache is not None:
        cache = ConditionCache(question.cache, progress=progress)
        cache.check(recording, question.teacher, question.teacher_lora is not None)
        conditions = Conditions(recording, device=device, cache=cache, progress=progress)
        return conditions, cache.negative()
    prompts = read_prompts(question.prompts) if question.prompts is not None else None
    if prompts is None and embedded_name(question.teacher):
        from fewstep.fashion import PROMPTS

        prompts = list(PROMPTS)
    labels = read_classes(question.classes) if question.classes is not None else None
    return Conditions(recording, prompts, labels, device, progress=progress), recording.negative()
