"""The roles of a run: full copies of the teacher's network, or adapters on one backbone."""

from __future__ import annotations

from functools import partial

import torch

from fewstep.adapters import AdapterRole, Backbone
from fewstep.config import RunConfig
from fewstep.denoiser import NetworkDenoiser
from fewstep.recording import Recording
from fewstep.roles import Role, make_role


def make_roles(
    config: RunConfig, recording: Recording, names: tuple[str, ...], device: torch.device
) -> dict[str, Role]:
    """The frozen teacher, the trainable roles ``names``, and ``ema`` where the run has one.

    Raises:
        UserError: the network has no layer for an adapter of ``config.lora_rank``.
    """
    bf16 = torch.bfloat16 if config.mixed_precision == "bf16" else None
    frozen = bf16 or torch.float32  # what is only read is bfloat16 itself; what is trained stays float32
    averaged = config.ema_decay > 0
    options = {"autocast": bf16, "device": device}
    trained = {"gradient_checkpointing": config.gradient_checkpointing, **options}

    def full(name: str) -> Role:
        return make_role(name, recording, trainable=True, **trained)

    if not config.lora_rank:
        roles = {"teacher": make_role("teacher", recording, trainable=False, dtype=frozen, **options)}
        roles |= {name: full(name) for name in names}
        if averaged:
            roles["ema"] = make_role("ema", recording, trainable=False, **options)
        return roles

    backbone = Backbone(
        recording.network,
        config.lora_rank,
        config.lora_alpha or config.lora_rank,
        dtype=frozen,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )

    def adapted(name: str, *, trainable: bool = True) -> AdapterRole:
        adapter = None if name == "teacher" else backbone.add(name, trainable=trainable, seed=config.seed)
        denoiser = NetworkDenoiser(
            backbone.network,
            recording.recipe,
            recording.schedule,
            recording.prediction_type,
            bf16,
            partial(backbone.playing, None if name == "teacher" else name),
        )
        return AdapterRole(name, backbone, denoiser, adapter)

    adapters = {name: adapted(name) for name in names if not (name == "critic" and config.full_critic)}
    roles = {"teacher": adapted("teacher"), **{name: adapters.get(name) or full(name) for name in names}}
    if averaged:
        roles["ema"] = adapted("ema", trainable=False)
        roles["ema"].copy_weights(roles["student"])
    return roles
