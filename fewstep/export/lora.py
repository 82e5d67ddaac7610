"""Writing a student as a LoRA: the adapter in the format that diffusers loads, its scheduler, fewstep.json and a card.

Without ``lora_adapter_metadata`` such a file forgets its alpha, and the student runs wrong without a warning. So it is
always written, and the folder is loaded again by stock diffusers and compared, layer by layer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.export.about import call_of, read_about, write_about
from fewstep.export.apply import LORA_FILE, lora_files, ship
from fewstep.export.card import write_card
from fewstep.export.errors import ExportError
from fewstep.export.folder import refuse_occupied, written
from fewstep.export.plan import StudentPlan
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

    Raises:
        ExportError: ``out`` is in use, or what stock diffusers loads from it is not what was trained.
    """
    out = Path(out)
    refuse_occupied(out)
    about = about_student(recording, plan, method, base_model, training, teacher_lora)
    adapters = {name: _adapter(role.experts[name], name, teacher_lora) for name in recording.components}
    about["lora"] = _about_lora(adapters)
    with written(out) as partial:
        for component, file in lora_files(about).items():
            _write_adapter(partial / file, adapters[component], about)
        plan.scheduler.save_pretrained(partial / "scheduler")
        write_about(partial, about)
        license_fields = license_of(recording, base_model, teacher_license)
        card = write_card(about, recording.pipeline, license_fields=license_fields, metrics=metrics, note=plan.note)
        (partial / "README.md").write_text(card, encoding="utf-8")
        bare = recording.networks
        if teacher_lora is not None:
            bare = {name: teacher_lora.without(name, network) for name, network in bare.items()}
        verify_lora(recording, adapters, bare, plan, partial, about)
    return out


@dataclass(frozen=True)
class Adapter:
    """What a LoRA file holds.

    Attributes:
        factors: layer -> (A, B), of shapes (rank, in, ...) and (out, rank, ...).
        rank: of most layers; that of the others shows in their factors.
        alpha: of layers of that rank. All layers are scaled by alpha / rank.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What every product is multiplied with."""
        return self.alpha / self.rank

    def state(self) -> dict[str, Tensor]:
        """The tensors under the names that diffusers loads, without the component's."""
        pairs = self.factors.items()
        return {f"{path}.lora_A.weight": a for path, (a, _) in pairs} | {f"{p}.lora_B.weight": b for p, (_, b) in pairs}

    def config(self) -> dict[str, Any]:
        """The fields of PEFT's configuration that the tensors do not tell."""
        config = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": list(self.factors)}
        ranks = {f"^{path}": len(a) for path, (a, _) in self.factors.items() if len(a) != self.rank}
        if ranks:
            config |= {"rank_pattern": ranks, "alpha_pattern": {path: n * self.scale for path, n in ranks.items()}}
        return config


def _adapter(role: Role, component: str, teacher_lora: FusedLora | None) -> Adapter:
    """The role's own adapter, or the sum of the teacher's LoRA and it: B A + B' A' = [B B'] [A; A']."""
    assert isinstance(role, AdapterRole)  # what a LoRA is exported of
    rank, alpha, weights = role.backbone.rank, role.backbone.alpha, role.weights

    def factor(path: str, name: str) -> Tensor:
        return weights.get_parameter(f"{path}.{name}.weight").detach()

    own = {path: (factor(path, "lora_A"), factor(path, "lora_B")) for path in role.backbone.targets}
    if teacher_lora is None:
        return Adapter(own, rank, alpha)
    # The teacher's products are scaled already, each by its own number, so the sum has the scale 1.
    factors = {path: (a, b * (alpha / rank)) for path, (a, b) in own.items()}
    for path, (a, b) in teacher_lora.factors.get(component, {}).items():
        if path in factors:
            own_a, own_b = factors[path]
            factors[path] = torch.cat([a.to(own_a), own_a]), torch.cat([b.to(own_b), own_b], dim=1)
        else:
            factors[path] = (a, b)
    ranks = Counter(len(a) for a, _ in factors.values())
    most = ranks.most_common(1)[0][0]
    return Adapter(factors, most, most)


def _about_lora(adapters: dict[str, Adapter]) -> dict[str, Any]:
    first, *others = adapters
    about = {"file": LORA_FILE, "rank": adapters[first].rank, "alpha": adapters[first].alpha}
    if others:
        about["further_files"] = {name: LORA_FILE.replace(".", f"_{name}.") for name in others}
    return about


def _write_adapter(path: Path, adapter: Adapter, about: dict[str, Any]) -> None:
    """One file, its names under the first network's: the one that pipelines' own loaders look for in every file."""
    prefix = f"{about['component']}."
    state = {f"{prefix}{k}": v.detach().cpu().contiguous() for k, v in adapter.state().items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in adapter.config().items()}),
        "fewstep": json.dumps(about, default=str),
    }
    save_file(state, path, metadata)


def verify_lora(
    recording: Recording,
    adapters: dict[str, Adapter],
    base: dict[str, nn.Module],
    plan: StudentPlan,
    folder: Path,
    about: dict[str, Any],
) -> None:
    """Load ``folder`` into a copy of the base model by stock diffusers; compare every layer, and walk every count.

    Raises:
        ExportError: a layer is missing, scaled otherwise, switched off or of other weights, or a walk fails.
    """
    networks = {name: on_the_same_weights(network) for name, network in base.items()}
    pipeline = with_parts(recording.pipeline, **networks)
    ship(pipeline, about, folder)
    for component, network in networks.items():
        adapter = adapters[component]
        layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
        if layers.keys() != adapter.factors.keys():
            odd = sorted(layers.keys() ^ adapter.factors.keys())
            raise ExportError(f"the exported LoRA loads into other layers than were trained: {', '.join(odd[:3])}")
        for path, layer in layers.items():
            if not _holds(layer, adapter, path):
                raise ExportError(f"the exported LoRA is not what was trained, in {component}.{path}")
    check_counts(recording, pipeline, plan, call_of(type(pipeline), read_about(folder)))


def _holds(layer: LoraLayer, adapter: Adapter, path: str) -> bool:
    active = layer.active_adapters
    if layer.disable_adapters or len(active) != 1 or active[0] not in layer.lora_A:
        return False
    for name, trained in zip(("lora_A", "lora_B"), adapter.factors[path], strict=True):
        loaded = getattr(layer, name)[active[0]].weight
        if not torch.equal(loaded, trained.to(loaded)):
            return False
    return layer.scaling[active[0]] == adapter.scale
