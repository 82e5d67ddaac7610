"""The roles of a run: full copies of the teacher's network, or adapters on one backbone, and what they start from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep import checkpoint
from fewstep.adapters import AdapterRole, Backbone
from fewstep.config import RunConfig
from fewstep.denoiser import NetworkDenoiser
from fewstep.errors import UserError
from fewstep.recording import Recording
from fewstep.roles import Role, make_role
from fewstep.teacher import load_teacher


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


def initialize(config: RunConfig, component: str, roles: dict[str, Role]) -> list[str]:
    """Take the weights of ``--init`` over: a run's roles, or the network of a pipeline folder for the student.

    Args:
        config: of the run.
        component: the denoiser's name in the teacher's pipeline.
        roles: from :func:`make_roles`.

    Returns:
        Lines to tell the user.

    Raises:
        UserError: they do not fit.
    """
    if config.init is None:
        return []
    source = Path(config.init)
    said = []
    if (source / "checkpoints").is_dir():
        _, tensors = checkpoint.load_latest(source / "checkpoints")
        for name in ("student", "critic"):
            if name in roles and name in tensors:
                said += _load_run(roles[name], tensors[name], source)
    else:
        network = getattr(load_teacher(config.init, config.trust_remote_code, flag="--init"), component, None)
        if network is None:
            raise UserError(f"--init {source} has no {component}; it is of another family than the teacher")
        if isinstance(roles["student"], AdapterRole):
            raise UserError(
                f"--init {source} is a whole network, and with --lora_rank the student is an adapter of the teacher; "
                "leave one of the two out"
            )
        roles["student"].load_state_dict({f"network.{k}": v for k, v in network.state_dict().items()})
        said.append(f"the student starts from {source}; the critic starts from the teacher")
    if "ema" in roles:
        roles["ema"].copy_weights(roles["student"])
    return said


def _load_run(role: Role, tensors: dict[str, Tensor], source: Path) -> list[str]:
    """Load a role of another run; a head that the other run did not train keeps its fresh weights."""
    if not any(name.startswith(f"{role.part}.") for name in tensors):
        has, want = ("a network", "an adapter") if role.part == "adapter" else ("an adapter", "a network")
        raise UserError(
            f"--init {source} holds {has} for the {role.name} where this run has {want}; "
            "give both runs the same --lora_rank and --full_critic"
        )
    said = []
    if "head" in role.added and not any(name.startswith("head.") for name in tensors):
        fresh = {name: value for name, value in role.state_dict().items() if name.startswith("head.")}
        tensors = {**tensors, **fresh}
        said.append(f"the run of --init trained no GAN head; the {role.name}'s starts afresh")
    role.load_state_dict(tensors)
    return said
