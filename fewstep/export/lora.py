"""Writing a student as a LoRA: the adapter in the format that diffusers loads, its scheduler, fewstep.json and a card.

Without ``lora_adapter_metadata`` such a file forgets its alpha, and the student runs wrong without a warning. So it is
always written, and the folder is loaded again by stock diffusers and compared, layer by layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from fewstep.adapters import AdapterRole
from fewstep.export.about import write_about
from fewstep.export.apply import LORA_FILE, ship
from fewstep.export.card import write_card
from fewstep.export.errors import ExportError
from fewstep.export.folder import refuse_occupied, written
from fewstep.export.plan import StudentPlan
from fewstep.export.student import about_student, license_of, walk_counts
from fewstep.export.trace import with_parts

if TYPE_CHECKING:
    from fewstep.recording import Recording


def loads_lora(network: nn.Module) -> bool:
    """Whether diffusers can load a LoRA into this network; some pipelines offer to save one that they cannot load."""
    return hasattr(network, "load_lora_adapter")


def export_lora(
    recording: Recording,
    role: AdapterRole,
    plan: StudentPlan,
    out: str | Path,
    *,
    method: str,
    base_model: str,
    teacher_license: str | Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``out`` as a LoRA of the teacher, and check it: loaded into the teacher, it holds what was trained.

    Args:
        recording: of the teacher; its pipeline is left as it is.
        role: whose adapter is written.
        plan: what it was trained for.
        out: the folder; an older student in its place is replaced.
        method: as in :func:`fewstep.export.export_student`, and so are the others.
        base_model: its name is also where the card says the pipeline comes from.
        teacher_license: of the teacher.
        metrics: for the card.
        training: for ``fewstep.json``.

    Raises:
        ExportError: ``out`` is in use, or what stock diffusers loads from it is not what was trained.
    """
    out = Path(out)
    refuse_occupied(out)
    rank, alpha = role.backbone.rank, role.backbone.alpha
    prefix = f"{recording.component}."
    state = {f"{prefix}{k}": v.detach().cpu().contiguous() for k, v in role.weights.state_dict().items()}
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(role.backbone.targets)}
    about = about_student(recording, plan, method, base_model, training)
    about["lora"] = {"file": LORA_FILE, "rank": rank, "alpha": alpha}
    with written(out) as partial:
        metadata = {
            "format": "pt",
            "lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in config.items()}),
            "fewstep": json.dumps(about, default=str),
        }
        save_file(state, partial / LORA_FILE, metadata)
        plan.scheduler.save_pretrained(partial / "scheduler")
        write_about(partial, about)
        license_fields = license_of(recording, base_model, teacher_license)
        card = write_card(about, recording.pipeline, license_fields=license_fields, metrics=metrics, note=plan.note)
        (partial / "README.md").write_text(card, encoding="utf-8")
        verify_lora(recording, role, plan, partial)
    return out


def verify_lora(recording: Recording, role: AdapterRole, plan: StudentPlan, folder: Path) -> None:
    """Load ``folder`` into a copy of the teacher by stock diffusers; compare every layer, and walk every count.

    Raises:
        ExportError: a layer is missing, scaled otherwise, switched off or of other weights, or a walk fails.
    """
    network = copy.deepcopy(recording.network)
    pipeline = with_parts(recording.pipeline, **{recording.component: network})
    ship(pipeline, recording.component, type(plan.scheduler).__name__, folder)
    layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    if layers.keys() != set(role.backbone.targets):
        odd = sorted(layers.keys() ^ set(role.backbone.targets))
        raise ExportError(f"the exported LoRA loads into other layers than were trained: {', '.join(odd[:3])}")
    for path, layer in layers.items():
        if not _holds(layer, role, path):
            raise ExportError(f"the exported LoRA is not what was trained, in {recording.component}.{path}")
    walk_counts(recording, pipeline, plan)


def _holds(layer: LoraLayer, role: AdapterRole, path: str) -> bool:
    active = layer.active_adapters
    if layer.disable_adapters or len(active) != 1 or active[0] not in layer.lora_A:
        return False
    for factor in ("lora_A", "lora_B"):
        loaded = getattr(layer, factor)[active[0]].weight
        if not torch.equal(loaded, role.weights.get_submodule(f"{path}.{factor}").weight.to(loaded)):
            return False
    return layer.scaling[active[0]] == role.backbone.alpha / role.backbone.rank
