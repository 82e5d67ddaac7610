"""What a teacher is asked with: the call it is recorded at, its guidance, and the conditions."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fewstep.conditioning.conditioning import Conditioning
from fewstep.config.run import RunConfig
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.conditions import Conditions, read_classes, read_prompts
from fewstep.diffusion.intervals import TimedScale
from fewstep.errors import UserError
from fewstep.export import why_no_lora
from fewstep.recording import Recording
from fewstep.recording.pipeline import is_quantized
from fewstep.teachers.loading import embedded_name


class TeacherSettings(Protocol):
    """The settings that say it; :class:`fewstep.config.run.RunConfig` documents them."""

    teacher: str
    prompts: str | None
    classes: str | None
    cache: str | None
    call: dict[str, Any] | None
    guidance_scale: float | None
    negative_prompt: str | None
    teacher_lora: str | None


def teacher_call(settings: TeacherSettings) -> dict[str, Any]:
    """The keyword arguments that the teacher is recorded with."""
    call = dict(settings.call or {})
    for name in ("guidance_scale", "negative_prompt"):
        if getattr(settings, name) is not None:
            call[name] = getattr(settings, name)
    return call


def guidance_of(settings: TeacherSettings, recording: Recording) -> float | TimedScale:
    """The w of neg + w (pos - neg) that the teacher is asked with, or one for each expert that shares the time."""
    from fewstep.fashion import TEACHERS

    report = recording.guidance
    wish = settings.guidance_scale
    if report.expert_scales:
        # Seen in the call, of which the wish is a part; it is meant in fewstep's own convention.
        less = report.offset or 0.0 if wish is not None else 0.0
        scales = tuple(1.0 if w == 1.0 else w - less for w in report.expert_scales)
        return scales[0] if len(set(scales)) == 1 else TimedScale(recording.intervals, scales)
    # A network that is told its guidance got it with the conditioning; what is left is a second, explicit guidance.
    if wish is not None and not report.embedded:
        return wish
    if wish is None and (known := embedded_name(settings.teacher)):
        return TEACHERS[known].guidance_scale
    if report.off_argument is None or report.argument_scale is None:
        return 1.0
    return report.argument_scale + (report.offset or 0.0)


def conditions_of(
    settings: TeacherSettings, recording: Recording, device: torch.device | str, *, progress: bool = False
) -> tuple[Conditions, Conditioning | None]:
    """What is generated for, and the teacher's negative: encoded now, or read from a cache.

    An embedded teacher has prompts of its own.

    Raises:
        UserError: they are not what the teacher takes.
    """
    if settings.cache is not None:
        cache = ConditionCache(settings.cache, progress=progress)
        cache.check(recording, settings.teacher, settings.teacher_lora is not None)
        conditions = Conditions(recording, device=device, cache=cache, progress=progress)
        return conditions, cache.negative()
    prompts = read_prompts(settings.prompts) if settings.prompts is not None else None
    if prompts is None and embedded_name(settings.teacher):
        from fewstep.fashion import PROMPTS

        prompts = list(PROMPTS)
    labels = read_classes(settings.classes) if settings.classes is not None else None
    return Conditions(recording, prompts, labels, device, progress=progress), recording.negative()


def refuse_quantized(config: RunConfig, recording: Recording, loaded: bool) -> None:
    """Refuse what a quantised teacher cannot do, and a teacher that was to be quantised and is not.

    Args:
        config: of the run.
        recording: of the teacher.
        loaded: whether this run loaded it, and so can load it once more.

    Raises:
        UserError: one of these.
    """
    quantized = {name: is_quantized(network) for name, network in recording.networks.items()}
    if config.quantization is not None and not all(quantized.values()):
        name = next(name for name, whether in quantized.items() if not whether)
        why = "has no layer that can be quantised" if loaded else "is loaded already"
        raise UserError(f"--quantization {config.quantization}: the {name} {why}; leave it out")
    if not any(quantized.values()):
        return
    name = next(name for name, whether in quantized.items() if whether)
    if not config.lora_rank or config.full_critic:
        raise UserError(f"the {name} is quantised, so that only adapters can be trained: give --lora_rank alone")
    whole = config.merge or why_no_lora(recording) is not None
    if whole and config.quantization is None:
        raise UserError(
            f"the {name} is quantised and its weights in full precision are not at hand, so that no whole pipeline can "
            "be written; give the teacher unquantised, with --quantization"
        )
