"""The roles of a run: full copies of the teacher's network, or adapters on one backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fewstep.config.run import RunConfig
from fewstep.networks.adapters import AdapterRole, Backbone, called_by_keyword
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.experts import ExpertsRole
from fewstep.networks.roles import FOLLOWERS, Role, follow, make_role
from fewstep.recording import Recording


def make_roles(
    config: RunConfig,
    recording: Recording,
    names: tuple[str, ...],
    device: torch.device,
    student: Recording | None = None,
) -> dict[str, Role]:
    """The frozen teacher, the roles ``names``, and ``ema`` where the run has one.

    All are trainable but ``target``, a method's own slow copy of the student, which the loop moves.

    Args:
        config: of the run.
        recording: of the teacher.
        names: of the roles beside teacher and ema.
        device: of all of them.
        student: the recording of the student's own pipeline, where it has other experts than the teacher's.

    Raises:
        UserError: the network has no layer for an adapter of ``config.lora_rank``.
    """
    backbones: dict[int, Callable[..., Role]] = {}

    def adapters(one: Recording) -> Callable[..., Role]:
        # One backbone for all roles on a network, and for all experts that begin as one network.
        return backbones.setdefault(id(one.network), _adapters(config, one, device))

    def copies(one: Recording) -> Callable[..., Role]:
        return _copies(config, one, device)

    def make(name: str, *, trainable: bool) -> Role:
        own = student if student is not None and name in ("student", *FOLLOWERS) else recording
        full = not config.lora_rank or (name.startswith("critic") and config.full_critic)
        return _of_each_expert(own, copies if full else adapters, name, trainable)

    roles = {"teacher": make("teacher", trainable=False)}
    roles |= {name: make(name, trainable=name != "target") for name in names}
    if config.ema_decay > 0:
        roles["ema"] = make("ema", trainable=False)
    follow(roles)
    return roles


def _of_each_expert(
    recording: Recording, maker: Callable[[Recording], Callable[..., Role]], name: str, trainable: bool
) -> Role:
    """A role as the maker for a single network makes it; where several share the time, of one such role for each."""
    if len(recording.experts) == 1:
        return maker(recording)(name, trainable=trainable)
    shared = len({id(expert.network) for expert in recording.experts}) < len(recording.experts)
    experts = {}
    for lowest, expert in zip(recording.intervals.lowest, recording.experts, strict=True):
        own = f"{name}_{expert.component}" if shared else name  # adapters of one network need names of their own
        experts[expert.component] = (lowest, maker(recording.of(expert))(own, trainable=trainable))
    return ExpertsRole(name, experts)


def _copies(config: RunConfig, recording: Recording, device: torch.device) -> Callable[..., Role]:
    """Makes roles that are networks of their own."""
    bf16 = _half(config)

    def make(name: str, *, trainable: bool) -> Role:
        return make_role(
            name,
            recording,
            trainable=trainable,
            # The teacher is only read, so its parameters themselves are bfloat16; trained ones stay float32.
            dtype=bf16 if bf16 and name == "teacher" else torch.float32,
            autocast=bf16,
            gradient_checkpointing=trainable and config.gradient_checkpointing,
            device=device,
        )

    return make


def _adapters(config: RunConfig, recording: Recording, device: torch.device) -> Callable[..., Role]:
    """Makes roles on one backbone: the teacher is the backbone itself."""
    bf16 = _half(config)
    backbone = Backbone(
        recording.network,
        config.lora_rank,
        config.lora_alpha or config.lora_rank,
        dtype=bf16 or torch.float32,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
        without=called_by_keyword(recording, device),
    )

    def make(name: str, *, trainable: bool) -> AdapterRole:
        adapter = None if name == "teacher" else backbone.add(name, trainable=trainable, seed=config.seed)
        denoiser = NetworkDenoiser(
            backbone.network,
            recording.recipe,
            recording.schedule,
            recording.prediction_type,
            bf16,
            partial(backbone.active, None if adapter is None else name),
        )
        return AdapterRole(name, backbone, denoiser, adapter)

    return make


def _half(config: RunConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.mixed_precision == "bf16" else None
