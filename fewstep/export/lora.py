"""Writing a student as a LoRA: the adapter in the format that diffusers loads, its scheduler, fewstep.json and a card.

A LoRA that is scaled by alpha / rank other than 1 is right in diffusers alone, and there only while its metadata are
kept: other programs, and diffusers' own converters, take alpha for the rank. So the scale is multiplied into B, and
alpha is the rank. The folder is loaded again by stock diffusers and compared, layer by layer.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import one_line
from fewstep.export.about import call_of, read_about, write_about
from fewstep.export.apply import LORA_FILE, lora_files, ship
from fewstep.export.card.card import write_card
from fewstep.export.errors import ExportError
from fewstep.export.folder import refuse_occupied, written
from fewstep.export.lora_names import further_names
from fewstep.export.lost_parts import refuse_lost_parts
from fewstep.export.related.walk import walk_relatives
from fewstep.export.student_adapter import ADAPTER
from fewstep.export.walk.control import as_student
from fewstep.export.walk.plan import StudentPlan
from fewstep.export.whole import about_student, check_counts, license_of
from fewstep.networks.adapters import AdapterRole, on_the_same_weights
from fewstep.recording.pipeline import with_parts

if TYPE_CHECKING:
    from fewstep.networks.roles import Role
    from fewstep.recording import Recording
    from fewstep.teachers.lora import FusedLora


def loads_lora(network: nn.Module) -> bool:
    """Whether diffusers can load a LoRA into this network; some pipelines offer to save one that they cannot load."""
    return hasattr(network, "load_lora_adapter")


def why_no_lora(recording: Recording, teacher_lora: FusedLora | None = None) -> str | None:
    """Why no LoRA of the base model can hold a student of this teacher; None where one can."""
    other = next((expert.network for expert in recording.experts if not loads_lora(expert.network)), None)
    if other is not None:
        return f"diffusers loads no LoRA into a {type(other).__name__}"
    if teacher_lora is not None and teacher_lora.apart is not None:
        return f"the teacher's LoRA cannot be a part of the student's ({teacher_lora.apart})"
    return None


def export_lora(
    recording: Recording,
    role: Role,
    plan: StudentPlan,
    out: str | Path,
    *,
    method: str,
    base_model: str,
    teacher_license: str | Mapping[str, str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    teacher_lora: FusedLora | None = None,
    base_files: Mapping[str, str] | None = None,
) -> Path:
    """Write ``out`` as a LoRA of the base model, and check it: loaded into that, it holds what was trained.

    Args:
        recording: of the teacher; its pipeline is left as it is.
        role: whose adapter is written; of several experts each one's in a file of its own.
        plan: what it was trained for.
        out: the folder; an older student in its place is replaced.
        method: as in :func:`fewstep.export.export_student`, and so are the others.
        base_model: its name is also where the card says the pipeline comes from.
        teacher_license: of the teacher.
        metrics: for the card.
        training: for ``fewstep.json``.
        teacher_lora: what was fused into the base model to make the teacher; the files then hold both.
        base_files: as in :func:`fewstep.export.export_student`; the card's code loads them.

    Raises:
        ExportError: ``out`` is in use, the teacher has parts that its base model does not, or what stock diffusers
            loads from it is not what was trained.
    """
    out = Path(out)
    recording = as_student(recording, plan.scheduler, plan.call, plan.steps)
    refuse_occupied(out)
    refuse_lost_parts(recording)
    about = about_student(recording, plan, method, base_model, training, teacher_lora, base_files)
    about["related"] = walk_relatives(recording, plan)
    adapters = adapters_of(recording, role, teacher_lora)
    about["lora"] = _about_lora(recording, adapters)
    with written(out) as partial:
        _write_weights(partial, adapters, plan, about)
        write_about(partial, about)
        pipeline = verify_lora(recording, adapters, partial, about, teacher_lora)
        license_fields = license_of(recording, base_model, teacher_license)
        # The card is about the pipeline with the student's scheduler, not with the teacher's.
        card = write_card(about, pipeline, license_fields=license_fields, metrics=metrics, note=plan.note)
        (partial / "README.md").write_text(card, encoding="utf-8")
        check_counts(recording, pipeline, plan, call_of(type(pipeline), read_about(partial)))
    return out


def rehearse_lora(recording: Recording, role: Role, plan: StudentPlan, teacher_lora: FusedLora | None = None) -> None:
    """Write an untrained role as a LoRA, and load it as diffusers does: what could not be shipped is not trained.

    Nothing of it is left, and no network is called; the plan's walks were checked when it was made.

    Args:
        recording: as in :func:`export_lora`, and so are the others.
        role: that will be exported.
        plan: of the student.
        teacher_lora: what was fused into the base model.

    Raises:
        ExportError: diffusers does not load what would be written.
    """
    about = about_student(recording, plan, "", "", None, teacher_lora)
    adapters = adapters_of(recording, role, teacher_lora)
    about["lora"] = _about_lora(recording, adapters)
    with tempfile.TemporaryDirectory() as folder:
        _write_weights(Path(folder), adapters, plan, about)
        verify_lora(recording, adapters, Path(folder), about, teacher_lora)


@dataclass(frozen=True)
class Adapter:
    """What a LoRA file holds.

    Attributes:
        factors: layer -> (A, B), of shapes (rank, in, ...) and (out, rank, ...): its weight grows by B A.
        rank: of most layers; that of the others shows in their factors. Alpha is the rank everywhere.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int

    def state(self) -> dict[str, Tensor]:
        """The tensors under the names that diffusers loads, without the component's."""
        pairs = self.factors.items()
        return {f"{path}.lora_A.weight": a for path, (a, _) in pairs} | {f"{p}.lora_B.weight": b for p, (_, b) in pairs}

    def config(self) -> dict[str, Any]:
        """The fields of PEFT's configuration that the tensors do not tell."""
        config = {"r": self.rank, "lora_alpha": self.rank, "target_modules": list(self.factors)}
        ranks = {f"^{path}": len(a) for path, (a, _) in self.factors.items() if len(a) != self.rank}
        if ranks:
            config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
        return config


def adapters_of(recording: Recording, role: Role, teacher_lora: FusedLora | None) -> dict[str, Adapter]:
    """What the file of each network will hold, by the network's name in the pipeline."""
    return {name: _adapter(role.experts[name], name, teacher_lora) for name in recording.components}


def _adapter(role: Role, component: str, teacher_lora: FusedLora | None) -> Adapter:
    """The role's own adapter, or the sum of the teacher's LoRA and it: B A + B' A' = [B B'] [A; A']."""
    assert isinstance(role, AdapterRole)  # what a LoRA is exported of
    scale, weights = role.backbone.alpha / role.backbone.rank, role.weights

    def factor(path: str, name: str) -> Tensor:
        return weights.get_parameter(f"{path}.{name}.weight").detach()

    factors = {path: (factor(path, "lora_A"), factor(path, "lora_B") * scale) for path in role.backbone.targets}
    added = {} if teacher_lora is None else teacher_lora.factors.get(component, {})
    for path, (a, b) in added.items():
        if path in factors:
            own_a, own_b = factors[path]
            factors[path] = torch.cat([a.to(own_a), own_a]), torch.cat([b.to(own_b), own_b], dim=1)
        else:
            factors[path] = (a, b)
    ranks = Counter(len(a) for a, _ in factors.values())
    return Adapter(factors, ranks.most_common(1)[0][0])


def _about_lora(recording: Recording, adapters: dict[str, Adapter]) -> dict[str, Any]:
    first, *others = adapters
    rank = adapters[first].rank
    about: dict[str, Any] = {"file": LORA_FILE, "rank": rank, "alpha": rank, "adapter": ADAPTER}
    if others:
        about["further_files"] = {name: LORA_FILE.replace(".", f"_{name}.") for name in others}
    about["network"] = type(recording.networks[first]).__name__
    return about


def _write_weights(folder: Path, adapters: dict[str, Adapter], plan: StudentPlan, about: dict[str, Any]) -> None:
    """The adapters' files, for diffusers and for other programs, and the scheduler."""
    for component, file in lora_files(about).items():
        adapter = adapters[component]
        _write_adapter(folder / file, adapter, about)
        for names in further_names(about["lora"]["network"]):
            metadata = {"format": "pt", "fewstep": json.dumps(about, default=str)}
            state = _contiguous(names.state(adapter.factors))
            save_file(state, folder / names.file_of(component, about["component"]), metadata)
    plan.scheduler.save_pretrained(folder / "scheduler")


def _write_adapter(path: Path, adapter: Adapter, about: dict[str, Any]) -> None:
    """One file, its names under the first network's: the one that pipelines' own loaders look for in every file."""
    prefix = f"{about['component']}."
    state = {f"{prefix}{key}": value for key, value in adapter.state().items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in adapter.config().items()}),
        "fewstep": json.dumps(about, default=str),
    }
    save_file(_contiguous(state), path, metadata)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def verify_lora(
    recording: Recording,
    adapters: dict[str, Adapter],
    folder: Path,
    about: dict[str, Any],
    teacher_lora: FusedLora | None = None,
) -> DiffusionPipeline:
    """Load ``folder`` into a copy of the base model by stock diffusers, and compare every layer. Returns the pipeline.

    Raises:
        ExportError: diffusers does not load it, or a layer is missing, scaled, switched off or of other weights.
    """
    base = recording.networks
    if teacher_lora is not None:
        base = {name: teacher_lora.without(name, network) for name, network in base.items()}
    networks = {name: on_the_same_weights(network) for name, network in base.items()}
    pipeline: DiffusionPipeline = with_parts(recording.pipeline, **networks)
    try:
        ship(pipeline, about, folder)
    except Exception as error:  # each pipeline's loader has exceptions of its own
        kind = type(recording.pipeline).__name__
        said = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise ExportError(f"diffusers does not load a LoRA student of this {kind} ({said})") from error
    for component, network in networks.items():
        adapter = adapters[component]
        layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
        if layers.keys() != adapter.factors.keys():
            odd = sorted(layers.keys() ^ adapter.factors.keys())
            raise ExportError(f"the exported LoRA loads into other layers than were trained: {', '.join(odd[:3])}")
        for path, layer in layers.items():
            if not _holds(layer, adapter, path):
                raise ExportError(f"the exported LoRA is not what was trained, in {component}.{path}")
    return pipeline


def _holds(layer: LoraLayer, adapter: Adapter, path: str) -> bool:
    if layer.disable_adapters or layer.active_adapters != [ADAPTER] or ADAPTER not in layer.lora_A:
        return False
    for name, trained in zip(("lora_A", "lora_B"), adapter.factors[path], strict=True):
        loaded = getattr(layer, name)[ADAPTER].weight
        if loaded.is_meta or not torch.equal(loaded, trained.to(loaded)):
            return False
    return layer.scaling[ADAPTER] == 1.0
