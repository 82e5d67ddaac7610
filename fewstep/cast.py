"""The roles of a run: full copies of the teacher's network, or adapters on one backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fewstep.adapters import AdapterRole, Backbone
from fewstep.config import RunConfig
from fewstep.denoiser import NetworkDenoiser
from fewstep.recording import Recording
from fewstep.roles import Role, make_role
from fewstep.routing import RoutedRole


def make_roles(
    config: RunConfig, recording: Recording, names: tuple[str, ...], device: torch.device
) -> dict[str, Role]:
    """The frozen teacher, the trainable roles ``names``, and ``ema`` where the run has one.

    Raises:
        UserError: the network has no layer for an adapter of ``config.lora_rank``.
    """
    copy = _of_each_expert(recording, lambda one: _copies(config, one, device))
    make = _of_each_expert(recording, lambda one: _adapters(config, one, device)) if config.lora_rank else copy
    roles = {"teacher": make("teacher", trainable=False)}
    for name in names:
        own = copy if name == "critic" and config.full_critic else make
        roles[name] = own(name, trainable=True)
    if config.ema_decay > 0:
        roles["ema"] = make("ema", trainable=False)
        roles["ema"].copy_weights(roles["student"])
    return roles


def _of_each_expert(recording: Recording, makers: Callable[[Recording], Callable[..., Role]]) -> Callable[..., Role]:
    """Makes roles as the maker of a single network does; where several share the time, of one such role for each."""
    if len(recording.experts) == 1:
        return makers(recording)
    lowest = recording.intervals.lowest
    each = {e.component: (low, makers(recording.of(e))) for low, e in zip(lowest, recording.experts, strict=True)}

    def make(name: str, *, trainable: bool) -> RoutedRole:
        return RoutedRole(name, {key: (low, one(name, trainable=trainable)) for key, (low, one) in each.items()})

    return make


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
    )

    def make(name: str, *, trainable: bool) -> AdapterRole:
        adapter = None if name == "teacher" else backbone.add(name, trainable=trainable, seed=config.seed)
        denoiser = NetworkDenoiser(
            backbone.network,
            recording.recipe,
            recording.schedule,
            recording.prediction_type,
            bf16,
            partial(backbone.playing, None if adapter is None else name),
        )
        return AdapterRole(name, backbone, denoiser, adapter)

    return make


def _half(config: RunConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.mixed_precision == "bf16" else None
