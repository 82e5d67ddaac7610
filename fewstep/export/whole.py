"""Writing a student: a stock pipeline folder with the student's weights, its scheduler, fewstep.json and a card."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

from fewstep.errors import one_line
from fewstep.export.about import call_of, read_about, write_about
from fewstep.export.any_flow import about_gate
from fewstep.export.card.card import write_card
from fewstep.export.copied_parts import save_pipeline
from fewstep.export.errors import ExportError
from fewstep.export.folder import refuse_occupied, written
from fewstep.export.inputs import about_inputs, untrained_pictures
from fewstep.export.lost_parts import refuse_lost_parts
from fewstep.export.precision import as_computed, as_written
from fewstep.export.published_paths import publish_no_paths
from fewstep.export.related.walk import walk_relatives
from fewstep.export.walk.check import Reference
from fewstep.export.walk.control import as_student
from fewstep.export.walk.plan import StudentPlan, check_student, reference_of
from fewstep.export.walk.size_checks import about_sizes, check_sizes
from fewstep.recording.pipeline import find_scheduler, with_parts
from fewstep.teachers import names
from fewstep.teachers.license import teacher_license_of
from fewstep.teachers.weights import load_pipeline
from fewstep.version import __version__

if TYPE_CHECKING:
    from fewstep.recording import Recording
    from fewstep.teachers.lora import FusedLora


def export_student(
    recording: Recording,
    network: nn.Module,
    plan: StudentPlan,
    out: str | Path,
    *,
    method: str,
    base_model: str,
    teacher_license: str | Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    teacher_lora: FusedLora | None = None,
    export_dtype: str | None = None,
    base_files: Mapping[str, str] | None = None,
) -> Path:
    """Write ``out`` as a pipeline that stock diffusers loads, and check it: reloaded, it must walk as planned.

    The recording's pipeline is left as it is. The folder appears complete or not at all; an older student in its place
    is replaced, anything else there is refused. Parts that were not trained are copied from the teacher's folder, where
    they are still what lies there.

    Args:
        recording: of the teacher.
        network: the trained student network, of the teacher network's class; an ``nn.ModuleDict`` of several experts.
        plan: what it was trained for.
        out: the folder.
        method: the method's name, for the card.
        base_model: the teacher's hub id or folder; of a folder only the name is published.
        teacher_license: of the teacher; None or empty: read from its own card where that lies beside it.
        metrics: name -> number, or row -> {name -> number}.
        training: what else ``fewstep.json`` shall say of the training; what JSON cannot hold is written as text.
        teacher_lora: what was fused into the teacher, and so is in ``network``.
        export_dtype: of the trained network in its files, one of :data:`fewstep.export.precision.EXPORT_DTYPES`; None:
            what the teacher's has in its files.
        base_files: the revision, subfolder and variant that name the teacher's files beside ``base_model``.

    Raises:
        ExportError: ``out`` is in use, the teacher has parts that its class does not load again, a trained number does
            not fit the dtype, or the written folder does not sample as planned.
    """
    out = Path(out)
    recording = as_student(recording, plan.scheduler, plan.call, plan.steps)
    networks = by_component(recording, network)
    _refuse(recording, networks, out)
    with written(out) as partial:
        saved = as_written(recording, networks, export_dtype)
        scheduler = {find_scheduler(recording.pipeline): copy.deepcopy(plan.scheduler)}
        student = with_parts(recording.pipeline, **saved, **scheduler)
        save_pipeline(student, partial, own={*saved, *scheduler})
        about = about_student(recording, plan, method, base_model, training, teacher_lora, base_files)
        about["related"] = walk_relatives(recording, plan)
        publish_no_paths(partial, about["base_model"])
        write_about(partial, about)
        license_fields = license_of(recording, base_model, teacher_license)
        card = write_card(about, student, license_fields=license_fields, metrics=metrics, note=plan.note)
        (partial / "README.md").write_text(card, encoding="utf-8")
        verify_student(recording, as_computed(recording, saved), plan, partial)
    return out


def by_component(recording: Recording, network: nn.Module) -> dict[str, nn.Module]:
    """The networks of :meth:`fewstep.networks.roles.Role.stock_network` by their names in the pipeline."""
    return dict(network.items()) if isinstance(network, nn.ModuleDict) else {recording.component: network}


def verify_student(recording: Recording, networks: dict[str, nn.Module], plan: StudentPlan, folder: str | Path) -> None:
    """Load ``folder`` with stock diffusers and walk it at every count of the plan.

    Its networks' answers are compared with those of ``networks``, so that the weights are proved as well.

    Raises:
        ExportError: it does not load, or a walk differs from the plan.
    """
    replaced = (find_scheduler(recording.pipeline), *networks)
    parts = recording.pipeline.components.items()
    shared = {name: part for name, part in parts if name not in replaced and part is not None}
    shared |= absent_parts(recording.pipeline)
    try:
        # What code there is in the folder was put there a moment ago, by this process.
        trusted = {"trust_remote_code": True} if _about_code(recording, plan) else {}
        pipeline = load_pipeline(folder, dtype=recording.dtype, **shared, **trusted)
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"the exported student does not load: {one_line(error)}") from error
    for name, network in networks.items():
        getattr(pipeline, name).to(next(network.parameters()).device)
    shipped = call_of(type(pipeline), read_about(folder))
    check_counts(recording, pipeline, plan, shipped, reference_of(recording, networks))


def check_counts(
    recording: Recording,
    pipeline: DiffusionPipeline,
    plan: StudentPlan,
    call: dict[str, Any],
    reference: Reference | None = None,
) -> None:
    """Check a loaded student at every count of its plan; at the planned one its answers are the reference's, if given.

    Args:
        recording: of the pipeline that the student is.
        pipeline: with the student's networks and scheduler.
        plan: of the student.
        call: that samples it; of a written student the one in its folder.
        reference: see :func:`reference_of`.

    Raises:
        ExportError: a walk differs from the plan.
    """
    check_sizes(recording, pipeline, plan, call)
    for count in plan.counts:
        # Every count's scheduler is walked; the weights are the same at all of them and are compared at one.
        compared = reference if count == plan.steps else None
        found = check_student(recording, pipeline, call, plan.move, count, compared)
        if found.grid != plan.grids[count]:
            raise ExportError(
                f"the exported student visits {found.grid} at {count} steps and was planned for {plan.grids[count]}"
            )


def absent_parts(pipeline: Any) -> dict[str, None]:
    """The parts that this pipeline does without though its class asks for them (Stable Diffusion 3 without its T5).

    Stock diffusers loads such a folder only when it is told so: ``from_pretrained(folder, text_encoder_3=None, ...)``.
    """
    return {
        n: None for n, part in pipeline.components.items() if part is None and n not in pipeline._optional_components
    }


def refuse_own_code(pipeline: DiffusionPipeline) -> None:
    """Raise for a pipeline whose class, or whose part's class, diffusers does not have: nobody could load the student.

    Raises:
        ExportError: it is code from the teacher's own folder, or of the caller.
    """
    own = [part for part in pipeline.components.values() if type(part).__module__.startswith("diffusers_modules")]
    if getattr(diffusers, type(pipeline).__name__, None) is None and not _ours(pipeline):
        own.append(pipeline)
    if own:
        raise ExportError(
            f"{type(own[0]).__name__} is code of the teacher's own, which stock diffusers does not have: its student "
            "cannot be written as a whole pipeline"
        )


def _ours(pipeline: DiffusionPipeline) -> bool:
    """Whether its class is this package's own, a copy of which is written beside the student."""
    return type(pipeline).__module__.startswith("fewstep.")


def _refuse(recording: Recording, networks: dict[str, nn.Module], out: Path) -> None:
    refuse_occupied(out)
    refuse_own_code(recording.pipeline)
    refuse_lost_parts(recording)
    for name, teacher in recording.networks.items():
        if name not in networks or _shapes(networks[name]) != _shapes(teacher):
            raise ExportError(f"the student's weights do not fit the teacher's {name}")


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def about_student(
    recording: Recording,
    plan: StudentPlan,
    method: str,
    base_model: str,
    training: Mapping[str, Any] | None,
    teacher_lora: FusedLora | None = None,
    base_files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The content of ``fewstep.json`` but for the relatives, which are walked; arguments as :func:`export_student`."""
    return {
        "method": method,
        "base_model": names.base_model(base_model),
        **({"base_files": dict(base_files)} if base_files else {}),
        **({} if teacher_lora is None else {"teacher_lora": teacher_lora.name}),
        "conditional": recording.conditional,
        "example": plan.example,
        **about_inputs(recording),
        "pipeline": type(recording.pipeline).__name__,
        "call": plan.call,
        "untrained_pictures": untrained_pictures(recording),
        "load": absent_parts(recording.pipeline),
        **_about_code(recording, plan),
        **about_gate(recording.pipeline),
        "steps": plan.steps,
        "counts": list(plan.counts),
        "timesteps": list(plan.timesteps),
        "grid": list(plan.grid),
        "grids": {str(count): list(grid) for count, grid in plan.grids.items()},
        "renoise": plan.renoise,
        **({"gamma": plan.gamma} if plan.renoise == "tcd" else {}),
        "noise_follows": plan.noise_follows,
        "initial_scale": plan.initial_scale,
        "prediction_type": plan.prediction_type,
        "component": recording.component,
        **_about_experts(recording, plan),
        **about_sizes(plan),
        **({} if plan.part is None else {"part": plan.part}),
        "scheduler": type(plan.scheduler).__name__,
        "note": plan.note,
        "trained_at_every_count": plan.trained_at_every_count,
        "guidance_range": list(plan.guidance_range) if plan.guidance_range else None,
        "guidable": plan.guidable,
        "training": dict(training or {}),
        "fewstep_version": __version__,
    }


def _about_code(recording: Recording, plan: StudentPlan) -> dict[str, str]:
    """The file in the student's folder that it is run with, where its pipeline or its scheduler is not stock."""
    own = [part.code_file for part in (recording.pipeline, plan.scheduler) if hasattr(part, "code_file")]
    return {"code": own[0]} if own else {}


def _about_experts(recording: Recording, plan: StudentPlan) -> dict[str, Any]:
    """Where several networks share the time: the lowest timestep of each, and what of the config may decide it."""
    if len(recording.experts) == 1:
        return {}
    visited = {recording.expert_at(timestep) for timestep in plan.timesteps}
    experts = {
        e.component: {"lowest_timestep": e.lowest if math.isfinite(e.lowest) else None, "trained": e in visited}
        for e in recording.experts
    }
    # The numbers, words and switches of the pipeline's own config: one of them may say where the networks change.
    config = {
        name: value
        for name, value in recording.pipeline.config.items()
        if not name.startswith("_") and (value is None or isinstance(value, bool | int | float | str))
    }
    return {"experts": experts, "config": config}


def license_of(recording: Recording, base_model: str, given: str | Mapping[str, str] | None) -> dict[str, str]:
    """The licence fields of a card: the given ones, or those of the teacher's own card where that can be found."""
    if given:
        return {"license": given} if isinstance(given, str) else dict(given)
    source = recording.pipeline.config.get("_name_or_path") or ""
    return teacher_license_of(base_model) or teacher_license_of(source)
