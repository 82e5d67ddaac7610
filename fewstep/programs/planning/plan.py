"""What a run would take, before anything is downloaded or trained: parameters, memory, and network calls.

The teacher is built weightless (:mod:`fewstep.programs.planning.weightless`), its call is recorded, the method gets its
real roles, and the most costly of its steps is played on fake tensors while their bytes are counted
(:mod:`fewstep.programs.planning.memory`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from fewstep.config.run import RunConfig
from fewstep.config.values import bytes_in_words
from fewstep.errors import UserError
from fewstep.programs.auto import CHOOSE, decide
from fewstep.programs.given_items import given_items, record_for
from fewstep.programs.methods import method_class
from fewstep.programs.planning.call_counts import Calls
from fewstep.programs.planning.counting import costliest_step, mean_calls
from fewstep.programs.planning.drawn import answering
from fewstep.programs.planning.dry_run import DryRun, World
from fewstep.programs.planning.evaluations import Evaluations, evaluations_of
from fewstep.programs.planning.items import planned_items
from fewstep.programs.planning.memory import tensor_bytes
from fewstep.programs.planning.moments import Moment, RoleBytes, most_of, role_bytes, weigh
from fewstep.programs.planning.quantized import plan_quantized
from fewstep.programs.planning.weightless import fake_tensors, fake_world, pretend, weightless_teacher
from fewstep.programs.planning.words import attention_in_words, settings_in_words
from fewstep.programs.teacher import TeacherSettings
from fewstep.recording import record
from fewstep.recording.pipeline import find_decoder, modules_of
from fewstep.recording.sizes import with_sizes

#: What no number here holds.
LEFT_OUT = (
    "what the allocator keeps beyond live tensors (fragmentation, caches), workspaces of cuDNN, cuBLAS and attention "
    "kernels, the CUDA context, images, prompts, sample grids, what is held in evaluations, and LPIPS with the decoder "
    "before it"
)


@dataclass(frozen=True)
class Plan:
    """What a run takes; all sizes in bytes.

    Attributes:
        teacher: as it was named.
        pipeline: its class.
        component: the denoiser's name.
        method: of the run.
        settings: what of the run's settings matters here, in words.
        attention: the network's attention processors, in words.
        device: the kind of device whose rules the step was played by.
        sample_shape: of one sample, of items that have several sizes the largest.
        parameters: by component of the pipeline.
        recording: weights of the whole pipeline, which is recorded and encodes before the training.
        encoding: by network that encodes, what it takes at most beside its weights, before the training.
        item: what one item takes encoded, in all of its draws, beside what items share; None of prompts, labels or
            nothing.
        items: what all of the run's take, in words; "" where there are none.
        notes: what else a user may want to know of them, a line each.
        kept: weights of the pipeline that stay beside the training: denoiser and decoder.
        roles: by name.
        moments: by role, its turn in the most costly step.
        calls: network calls of a step, per sample, mean over the last PERIOD steps.
        evaluations: of the student while it is trained; None where there are none.
    """

    teacher: str
    pipeline: str
    component: str
    method: str
    settings: str
    attention: str
    device: str
    sample_shape: tuple[int, ...]
    parameters: dict[str, int]
    recording: int
    encoding: dict[str, int]
    item: int | None
    items: str
    notes: list[str]
    kept: int
    roles: dict[str, RoleBytes]
    moments: dict[str, Moment]
    calls: dict[str, Calls]
    evaluations: Evaluations | None

    @property
    def held(self) -> int:
        """Weights and optimizer, which are there all the time."""
        return self.kept + sum(role.weights + role.optimizer for role in self.roles.values())

    @property
    def peak(self) -> int:
        """Estimate of the most that is in use at once."""
        return max(self.encoders_peak, self.held + max(moment.peak for moment in self.moments.values()))

    @property
    def encoders_peak(self) -> int:
        """Estimate of the most before the training, while the pipeline is whole and one of its networks encodes."""
        return self.recording + max(self.encoding.values(), default=0)


def plan(teacher: str, method: str = "dmd2", **settings: Any) -> Plan:
    """What a run of ``fewstep.distill(teacher, method, **settings)`` takes; only configuration files are downloaded.

    Args:
        teacher: folder (configuration files are enough), hub id, or embedded name.
        method: a file name of ``fewstep.trainers``, or ``auto`` for the best measured one.
        **settings: fields of the method's configuration; ``out`` is not needed. ``items`` may be a list of them.

    Raises:
        UserError: for everything that a user can mend.
    """
    items = None if isinstance(settings.get("items"), str | Path) else settings.pop("items", None)
    if method == CHOOSE:
        decision = decide({"teacher": teacher, **settings})
        decision.say()
        return Planner(decision.config, decision.method, items=items).plan()
    try:
        config = method_class(method).Config(teacher=teacher, **{"out": "", **settings})
    except TypeError as error:
        raise UserError(f"{method} has no such setting: {error}") from error
    return Planner(config, method, items=items).plan()


class Planner:
    """A teacher without weights, recorded, and what runs on it would take.

    Args:
        config: of the run.
        method: its name.
        build: makes the teacher's pipeline where no folder or hub id does; it is given the context in which networks,
            and networks only, are to be made.
        items: that are in memory, in the place of ``config.items``.

    Raises:
        UserError: the teacher cannot be built, or cannot be recorded.
    """

    def __init__(
        self,
        config: RunConfig,
        method: str,
        build: Callable[[World], DiffusionPipeline] | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.config, self.method, self.mode = config, method, fake_tensors()
        if build is None:
            self.pipeline = weightless_teacher(config.teacher, self.mode, config.revision, config.subfolder)
        else:
            self.pipeline = build(partial(fake_world, self.mode))
        with answering(self.pipeline, self.mode) as taken:
            call = TeacherSettings.of(config).recorded_call
            self.items = given_items(
                config.items if items is None else items, config.cache, self.pipeline, call, name=config.teacher
            )
            how = {"make_up": config.prompts is None, "without_images": config.without_images}
            self.recording = record_for(record, self.pipeline, call, self.items, **how)
            if self.items is not None:
                self.recording = with_sizes(self.recording, self.items.each, proven=False)
            self.planned = planned_items(config, self.recording, self.items)
        second = [] if (rule := self.recording.recipe.second) is None else [rule.component]
        self.trained_with = {*self.recording.components, *second}
        self.encoding = {name: most for name, most in taken.items() if most and name not in self.trained_with}
        self.device = torch.device("cuda" if torch.cuda.is_available() and not config.cpu else "cpu")
        self._counted: list[tuple[RunConfig, int, dict[str, Calls]]] = []

    def plan(self, **changes: Any) -> Plan:
        """Of the run, with some settings changed.

        Raises:
            UserError: the method's step cannot be played without values, or a setting does not fit the teacher.
        """
        config = replace(self.config, **changes).resolved()
        world = partial(fake_world, self.mode)
        bits, precision = config.quantization, config.mixed_precision
        networks = modules_of(self.pipeline) if bits is None else self._quantized(bits, precision)
        planned, moments = self.planned, dict[str, Moment]()
        try:
            step, calls = self._counts(config)
            for largest, told in [(self.recording, None)] if planned is None else planned.largest:
                recording = largest if bits is None else largest.on(networks)
                dry_run = DryRun(config, self.method, recording, self.device, world, told=told)
                method = dry_run.prepare()
                for role in method.roles.values():
                    for module in role.added.values():
                        pretend(module, self.mode)
                with world():
                    moments = most_of(moments, weigh(method, dry_run, step))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"{self.method} cannot be planned: its step depends on values of tensors: {error}"
            ) from error
        stay = {*self.trained_with, find_decoder(self.pipeline)}  # others are freed once everything is encoded
        kept = [network for name, network in networks.items() if name in stay]
        return Plan(
            teacher=config.teacher,
            pipeline=type(self.pipeline).__name__,
            component=self.recording.component,
            method=self.method,
            settings=settings_in_words(config),
            attention=attention_in_words(config, self.recording.network),
            device=self.device.type,
            sample_shape=self.recording.sample_shape if planned is None else planned.largest[0][0].sample_shape,
            parameters={
                name: sum(p.numel() for p in module.parameters()) for name, module in modules_of(self.pipeline).items()
            },
            recording=tensor_bytes(*networks.values()),
            encoding=self.encoding,
            item=None if planned is None else planned.each,
            items="" if planned is None else planned.words,
            notes=[] if planned is None else planned.notes,
            kept=tensor_bytes(*kept),
            roles=role_bytes(method, kept),
            moments=moments,
            calls=calls,
            evaluations=evaluations_of(config, dry_run.guidance_scale not in (0.0, 1.0), calls),
        )

    def _counts(self, config: RunConfig) -> tuple[int, dict[str, Calls]]:
        """The run's most costly step, and the network calls of a step: counted once for plans that make the same calls.

        Precision, checkpointing, what the weights are kept in and how guidance is asked for change what a call takes
        and none of the calls; of an adapter's rank it matters whether there is one.
        """
        rank = min(1, config.lora_rank)
        config = replace(config, mixed_precision="no", gradient_checkpointing=False, quantization=None, lora_rank=rank)
        config = replace(config, sequential_guidance=False)
        for known, step, calls in self._counted:
            if known == config:
                return step, calls
        step = costliest_step(config, self.method, self.recording)
        calls = mean_calls(config, self.method, self.recording)
        self._counted.append((config, step, calls))
        return step, calls

    def _quantized(self, quantization: str, mixed_precision: str) -> dict[str, nn.Module]:
        """The pipeline's networks, the linear layers of its denoisers in the sizes of quantised ones.

        The whole pipeline is in the dtype in which a run loads it.
        """
        with fake_world(self.mode):
            networks = {name: copy.deepcopy(network) for name, network in modules_of(self.pipeline).items()}
            for name in self.recording.components:
                plan_quantized(networks[name], quantization)
            if mixed_precision == "bf16":
                networks = {name: nn.Module.to(network, torch.bfloat16) for name, network in networks.items()}
        return networks

    def advice(self, plan: Plan, memory: int) -> str:
        """What would make ``plan`` fit ``memory`` bytes, in one line: of a few changes those that help, in order."""
        changes: dict[str, Any] = {}
        for name, (default, value) in _CHANGES.items():
            if default is not None and getattr(self.config, name) != default:
                continue
            try:
                smaller = self.plan(**changes, **{name: value})
            except UserError:  # this network has no layers for it
                continue
            if smaller.peak >= plan.peak:
                continue
            plan, changes = smaller, {**changes, name: value}
            if plan.peak <= memory:
                return f"it would fit with {_flags(changes)}: {bytes_in_words(plan.peak)}"
        if not changes:
            return "nothing that fewstep offers would make it smaller: choose a smaller teacher or resolution"
        taken = bytes_in_words(plan.peak)
        return f"even with {_flags(changes)} it would take {taken}: choose a smaller teacher or resolution"


#: What is tried where a run does not fit, from the harmless to the costly: where it has this default, another value.
_CHANGES: dict[str, tuple[Any, Any]] = {
    "mixed_precision": ("no", "bf16"),
    "gradient_checkpointing": (False, True),
    "sequential_guidance": (False, True),
    "lora_rank": (0, 64),
    "quantization": (None, "bitsandbytes_8bit"),
    "batch_size": (None, 1),
}


def _flags(changes: dict[str, Any]) -> str:
    return " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in changes.items())
