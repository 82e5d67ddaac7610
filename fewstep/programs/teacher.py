"""Opening a teacher, once for every program: loaded, with its LoRA, recorded and proven; and what it is asked with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.config.run import RunConfig
from fewstep.data.condition_cache import ConditionCache
from fewstep.data.conditions import Conditions, read_classes, read_prompts, refuse_other_kind
from fewstep.data.items import Items
from fewstep.data.shard_index import INDEX_FOLDER
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.intervals import TimedScale
from fewstep.diffusion.scales import GuidanceScale, PlacedScale
from fewstep.errors import UserError
from fewstep.export import why_no_lora
from fewstep.networks.response import refuse_unresponsive
from fewstep.programs.given_items import given_items, record_for
from fewstep.recording import Recording, record
from fewstep.recording.pipeline import is_quantized
from fewstep.recording.sizes import with_sizes
from fewstep.teachers.loading import load_teacher
from fewstep.teachers.lora import FusedLora, fuse_teacher_lora, with_own_weights
from fewstep.teachers.names import embedded_name
from fewstep.teachers.source import Source, find_source


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """Which teacher, and what it is recorded with; :class:`fewstep.config.run.RunConfig` documents the fields."""

    teacher: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    call: dict[str, Any] | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    negative_prompt: str | None = None
    teacher_lora: str | None = None
    quantization: str | None = None
    mixed_precision: str = "no"
    trust_remote_code: bool = False
    items: Any = None
    without_images: bool = False
    cache: str | None = None

    @classmethod
    def of(cls, settings: Any) -> TeacherSettings:
        """Those among the settings of a program.

        A method whose own ``variant`` is one of its paper's (consistency, MeanFlow) calls that of the teacher's weights
        ``teacher_variant``.
        """
        told = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        if hasattr(settings, "teacher_variant"):
            told["variant"] = settings.teacher_variant
        return cls(**told)

    @cached_property
    def source(self) -> Source:
        """The files that the teacher is loaded from.

        Raises:
            UserError: there are none, or not as the settings say.
        """
        return find_source(self.teacher, revision=self.revision, subfolder=self.subfolder, variant=self.variant)

    @property
    def recorded_call(self) -> dict[str, Any]:
        """The keyword arguments that the teacher is recorded with."""
        names = ("guidance_scale", "image_guidance_scale", "negative_prompt")
        told = {name: getattr(self, name) for name in names}
        return {**(self.call or {}), **{name: value for name, value in told.items() if value is not None}}

    def load(self, parts: dict[str, Any] | None = None, *, quantized: bool = True) -> DiffusionPipeline:
        """The teacher's pipeline, without its LoRA.

        A quantised one is loaded in the dtype that it computes in: text encoders in float32 would take more than is
        saved.

        Args:
            parts: of the pipeline that are there already.
            quantized: as the settings say; else its denoisers are loaded in full precision.

        Raises:
            UserError: it cannot be loaded.
        """
        half = self.quantization is not None and self.mixed_precision == "bf16"
        return load_teacher(
            self.teacher,
            self.trust_remote_code,
            source=self.source,
            dtype=torch.bfloat16 if half else torch.float32,
            quantization=self.quantization if quantized else None,
            **(parts or {}),
        )


@dataclass(frozen=True)
class Teacher:
    """A teacher, recorded and proven.

    Attributes:
        settings: it was opened with.
        recording: of its pipeline.
        guidance_scale: the w of neg + w (pos - neg) that it is asked with, or one for each expert that shares the time.
        lora: what was fused into it.
        items: that it was recorded with two of, where it looks at pictures; None for prompts, labels or nothing.
        source: the files that it was loaded from; None where it was in memory.
        reload: gives its pipeline once more, when it is told the parts that are there; None where that is not possible.
    """

    settings: TeacherSettings
    recording: Recording
    guidance_scale: GuidanceScale
    lora: FusedLora | None = None
    items: Items | None = None
    source: Source | None = None
    reload: Callable[[dict[str, Any]], DiffusionPipeline] | None = field(default=None, repr=False)

    @property
    def later_scales(self) -> tuple[float, ...]:
        """The scales between its further answers, as the pipeline has them in the call; () of at most two answers."""
        return self.recording.guidance.later_scales

    def refuse_next_time(self, what: str) -> None:
        """Raise ``UserError`` for a network that is told the next time too; ``what`` says what that forbids."""
        if self.recording.recipe.needs_next:
            raise UserError(f"this teacher's network is told the next time too, {what}")


def open_teacher(
    settings: TeacherSettings,
    device: torch.device | str,
    pipeline: DiffusionPipeline | None = None,
    *,
    make_up: bool = False,
    progress: bool = False,
) -> Teacher:
    """Load a teacher, fuse its LoRA, record and prove it.

    Args:
        settings: which, and how.
        device: of its networks.
        pipeline: where it is in memory already; it stays as it is, its device apart.
        make_up: pictures for a pipeline that looks at some, where the settings name no items.
        progress: show how far the look at the items is.

    Raises:
        UserError: and its subclasses, for everything that a user can mend.
    """
    given, lora = pipeline is not None, None
    pipeline = settings.load() if pipeline is None else pipeline
    if settings.teacher_lora is not None:
        pipeline = with_own_weights(pipeline) if given else pipeline
        lora = fuse_teacher_lora(pipeline, settings.teacher_lora)
    pipeline.to(device)
    items = given_items(
        settings.items, settings.cache, pipeline, settings.recorded_call, name=settings.teacher, progress=progress
    )
    how = {"make_up": make_up, "without_images": settings.without_images}
    recording = record_for(record, pipeline, settings.recorded_call, items, **how)
    _refuse_unquantized(settings, recording, given)
    if items is not None:
        recording = with_sizes(recording, items.each)
    recording.prove()
    # Where a LoRA is in a text encoder, what lies in the teacher's folder is another one.
    again = None if given or (lora is not None and lora.in_text) else settings.load
    source = None if given else settings.source
    return Teacher(settings, recording, guidance_of(settings, recording), lora, items, source, again)


def guidance_of(settings: TeacherSettings, recording: Recording) -> GuidanceScale:
    """The w of neg + w (pos - neg) that the teacher is asked with, or one for each expert that shares the time."""
    from fewstep.fashion import TEACHERS

    report = recording.guidance
    wish = settings.guidance_scale
    if report.expert_scales:
        # Seen in the call, of which the wish is a part; it is meant in fewstep's own convention.
        less = report.offset or 0.0 if wish is not None else 0.0
        scales = tuple(1.0 if w == 1.0 else w - less for w in report.expert_scales)
        return scales[0] if len(set(scales)) == 1 else TimedScale(recording.intervals, scales)
    if (weighing := report.weighing) is not None and weighing.places and report.argument_scale not in (None, 1.0):
        return PlacedScale(weighing.places, weighing.axis)  # its pipeline has no single scale that could be wished
    # A network that is told its guidance got it with the conditioning; what is left is a second, explicit guidance.
    if wish is not None and not report.embedded:
        return wish
    if wish is None and (known := embedded_name(settings.teacher)):
        return TEACHERS[known].guidance_scale
    if report.off_argument is None or report.argument_scale is None:
        return 1.0
    return report.argument_scale + (report.offset or 0.0)


class ConditionSettings(Protocol):
    """The settings that say what is generated for; :class:`fewstep.config.run.RunConfig` documents them."""

    out: str
    prompts: str | None
    classes: str | None
    cache: str | None
    data_text: str | None


def conditions_of(
    settings: ConditionSettings,
    teacher: Teacher,
    device: torch.device | str,
    *,
    progress: bool = False,
    draws: int = 1,
) -> Conditions:
    """What is generated for, and what guidance leads away from: encoded now, or read from a cache.

    An embedded teacher has prompts of its own. Of items so many draws are kept of what the teacher draws for them.

    Raises:
        UserError: they are not what the teacher takes.
    """
    recording, name = teacher.recording, teacher.settings.teacher
    if settings.cache is not None:
        cache = ConditionCache(settings.cache, progress=progress)
        if teacher.items is None:
            cache.check(recording, name, teacher.lora is not None)
            return Conditions(recording, device=device, cache=cache, progress=progress, draws=draws)
        refuse_other_kind(recording.conditional, cache.kind)
        cache.refuse_other_items(teacher.items)
        each = teacher.items.each
        cache.check(recording, name, teacher.lora is not None, each[0])
        return Conditions(recording, device=device, items=each, cache=cache, progress=progress, draws=draws)
    if teacher.items is not None:
        return Conditions(recording, device=device, items=teacher.items.each, progress=progress, draws=draws)
    prompts: list[str] | None = None
    if settings.prompts is not None:
        prompts = read_prompts(settings.prompts, settings.data_text, Path(settings.out) / INDEX_FOLDER)
    if prompts is None and embedded_name(name):
        from fewstep.fashion import PROMPTS

        prompts = list(PROMPTS)
    labels = read_classes(settings.classes) if settings.classes is not None else None
    return Conditions(recording, prompts, labels, device, progress=progress, draws=draws)


def refuse_guided_alike(
    recording: Recording,
    guidance_scale: GuidanceScale,
    conditions: Conditions,
    draws: Draws,
    told: Callable[[AnyConditioning], AnyConditioning] = lambda conditioning: conditioning,
) -> None:
    """Raise ``UserError`` where the teacher is to be guided and answers its conditions as it does its negative.

    Args:
        recording: of the teacher.
        guidance_scale: that it is asked with.
        conditions: of which the first two are tried.
        draws: of two samples.
        told: adds to a conditioning what the network is told beside it.
    """
    if conditions.further and guidance_scale != 1.0:
        shown = conditions.of_one_size()
        some = [told(shown.select([row])) for row in range(min(2, len(shown)))]
        refuse_unresponsive(recording, some, draws.normal("response", shown.shape(0)))


def quantized_network(recording: Recording) -> str | None:
    """The name of a teacher's first quantised network; None where there is none."""
    return next((name for name, network in recording.networks.items() if is_quantized(network)), None)


def _refuse_unquantized(settings: TeacherSettings, recording: Recording, given: bool) -> None:
    """Raise for a teacher that was to be quantised and is not."""
    plain = next((name for name, network in recording.networks.items() if not is_quantized(network)), None)
    if settings.quantization is not None and plain is not None:
        why = "is loaded already" if given else "has no layer that can be quantised"
        raise UserError(f"--quantization {settings.quantization}: the {plain} {why}; leave it out")


def refuse_quantized(config: RunConfig, teacher: Teacher) -> None:
    """Raise for what a quantised teacher cannot do: full copies, and a whole student where nobody has the weights."""
    name = quantized_network(teacher.recording)
    if name is None:
        return
    if not config.lora_rank or config.full_critic:
        raise UserError(f"the {name} is quantised, so that only adapters can be trained: give --lora_rank alone")
    if config.lora_walks == "merged":
        raise UserError(f"the {name} is quantised, and nothing can be added to its weights: leave out --lora_walks")
    whole = config.merge or why_no_lora(teacher.recording) is not None
    if whole and config.quantization is None:
        raise UserError(
            f"the {name} is quantised and its weights in full precision are not at hand, so that no whole pipeline can "
            "be written; give the teacher unquantised, with --quantization"
        )
