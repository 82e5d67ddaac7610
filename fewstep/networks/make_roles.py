"""The roles of a run: full copies of the teacher's network, or adapters on one backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fewstep.config.run import RunConfig
from fewstep.networks.adapters import AdapterRole, Backbone, called_by_keyword
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.experts import ExpertOf, ExpertsRole
from fewstep.networks.roles import FOLLOWERS, NetworkRole, Role, follow, is_trained, make_role
from fewstep.networks.second import with_frozen_second
from fewstep.recording import Recording
from fewstep.recording.pipeline import is_quantized


@dataclass(frozen=True)
class RoleSettings:
    """What the roles of a run are.

    Attributes:
        lora_rank: of adapters for all roles but the teacher; 0 makes them full copies instead.
        lora_alpha: an adapter's product is scaled by alpha / rank; default the rank.
        merged_walks: a student that is an adapter walks without gradient on a merged copy of the adapted weights.
        full_critic: critics are full copies beside adapters, too.
        mixed_precision: no (float32) or bf16 (autocast, and a bfloat16 teacher).
        gradient_checkpointing: trainable roles recompute activations in the backward pass.
        ema: whether there is an average of the student.
        seed: of the adapters' first weights.
    """

    lora_rank: int = 0
    lora_alpha: float | None = None
    merged_walks: bool = False
    full_critic: bool = False
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    ema: bool = False
    seed: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> RoleSettings:
        """Those of a run."""
        return cls(
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            merged_walks=config.merges_walks,
            full_critic=config.full_critic,
            mixed_precision=config.mixed_precision,
            gradient_checkpointing=config.gradient_checkpointing,
            ema=config.ema_decay > 0,
            seed=config.seed,
        )

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of forward passes, None where it is float32."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else None


def make_roles(
    settings: RoleSettings,
    recording: Recording,
    names: tuple[str, ...],
    device: torch.device,
    student: Recording | None = None,
    expert_of: ExpertOf | None = None,
) -> dict[str, Role]:
    """The frozen teacher, the roles ``names``, and ``ema`` where it is wanted.

    All are trainable but ``target``, a method's own slow copy of the student, which the loop moves, and nodes, which
    critics once were.

    Args:
        settings: what they are.
        recording: of the teacher.
        names: of the roles beside teacher and ema.
        device: of all of them.
        student: the recording of the student's own pipeline, where it has other experts than the teacher's, or a
            second network that is switched at other times.
        expert_of: which expert each time goes to, where several share the time; default those of the recordings.

    Raises:
        UserError: the network has no layer for an adapter of ``settings.lora_rank``.
    """
    beside: dict[int, nn.Module] = {}
    recording = with_frozen_second(recording, settings.half or torch.float32, device, beside)
    if student is not None:
        student = with_frozen_second(student, settings.half or torch.float32, device, beside)
    backbones: dict[int, Backbone] = {}

    def adapters(one: Recording) -> Callable[..., NetworkRole]:
        # One backbone for all roles on a network, and for all experts that begin as one network.
        if id(one.network) not in backbones:
            backbones[id(one.network)] = _backbone(settings, one, device)
        return _adapters(settings, one, backbones[id(one.network)])

    def copies(one: Recording) -> Callable[..., NetworkRole]:
        return _copies(settings, one, device)

    def make(name: str, *, trainable: bool) -> Role:
        own = student if student is not None and name in ("student", *FOLLOWERS) else recording
        full = not settings.lora_rank or (name.startswith("critic") and settings.full_critic)
        return _of_each_expert(own, copies if full else adapters, name, trainable, expert_of)

    roles = {"teacher": make("teacher", trainable=False)}
    roles |= {name: make(name, trainable=is_trained(name)) for name in names}
    if settings.ema:
        roles["ema"] = make("ema", trainable=False)
    follow(roles)
    return roles


def _of_each_expert(
    recording: Recording,
    maker: Callable[[Recording], Callable[..., NetworkRole]],
    name: str,
    trainable: bool,
    expert_of: ExpertOf | None,
) -> Role:
    """A role as the maker for a single network makes it; where several share the time, of one such role for each."""
    if len(recording.experts) == 1:
        return maker(recording)(name, trainable=trainable)
    shared = len({id(expert.network) for expert in recording.experts}) < len(recording.experts)
    experts = {}
    for lowest, expert in zip(recording.intervals.lowest, recording.experts, strict=True):
        own = f"{name}_{expert.component}" if shared else name  # adapters of one network need names of their own
        experts[expert.component] = (lowest, maker(recording.of(expert))(own, trainable=trainable))
    return ExpertsRole(name, experts, expert_of)


def _copies(settings: RoleSettings, recording: Recording, device: torch.device) -> Callable[..., NetworkRole]:
    """Makes roles that are networks of their own."""
    half = settings.half

    def make(name: str, *, trainable: bool) -> NetworkRole:
        return make_role(
            name,
            recording,
            trainable=trainable,
            # The teacher is only read, so its parameters themselves are bfloat16; trained ones stay float32.
            dtype=half if half and name == "teacher" else torch.float32,
            autocast=half,
            gradient_checkpointing=trainable and settings.gradient_checkpointing,
            device=device,
        )

    return make


def _backbone(settings: RoleSettings, recording: Recording, device: torch.device) -> Backbone:
    """What the roles on a recording's network share."""
    return Backbone(
        recording.network,
        settings.lora_rank,
        settings.lora_alpha or settings.lora_rank,
        dtype=settings.half or torch.float32,
        device=device,
        gradient_checkpointing=settings.gradient_checkpointing,
        without=called_by_keyword(recording, device),
        mergeable=_merges(settings, recording),
    )


def _merges(settings: RoleSettings, recording: Recording) -> bool:
    """Whether a student's walks without gradient go over a merged copy."""
    return settings.merged_walks and not is_quantized(recording.network)


def _adapters(settings: RoleSettings, recording: Recording, backbone: Backbone) -> Callable[..., NetworkRole]:
    """Makes roles on one backbone: the teacher is the backbone itself."""

    def make(name: str, *, trainable: bool) -> AdapterRole:
        adapter = None if name == "teacher" else backbone.add(name, trainable=trainable, seed=settings.seed)
        denoiser = NetworkDenoiser(
            backbone.network,
            recording.recipe,
            recording.schedule,
            recording.prediction_type,
            settings.half,
            partial(backbone.active, None if adapter is None else name),
        )
        # Only the student walks; of an expert the name goes on with its component.
        if adapter is not None and _merges(settings, recording) and name.startswith("student"):
            denoiser.without_gradient = backbone.merged_form(adapter)
        return AdapterRole(name, backbone, denoiser, adapter)

    return make
