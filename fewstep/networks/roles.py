"""Who plays in a training run: student, teacher, critic, ema, each a denoiser with the parameters it owns.

A role is used only through its denoiser, its parameters and its state, so that full copies of the teacher's network,
adapters on one backbone (:mod:`fewstep.networks.adapters`) and several experts (:mod:`fewstep.networks.experts`) take
each other's place without any trainer noticing.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.conditioning.ragged import AnyConditioning
from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import UserError
from fewstep.networks.denoiser import NetworkDenoiser
from fewstep.networks.features import FeatureTap
from fewstep.networks.in_dtype import in_dtype
from fewstep.recording import Recording

#: Roles that are averages of the student: for sampling, and a method's own slow copy that the student learns from.
FOLLOWERS = ("ema", "target")
#: What the names of nodes begin with: critics as they once were, frozen (DisBack).
NODE = "critic_node_"


class RoleDenoiser(Denoiser, Protocol):
    """What a role says about x0, be it with one network or with several."""

    schedule: NoiseSchedule
    prediction_type: str

    def raw(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.raw`."""
        ...

    def features(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, tap: FeatureTap) -> Tensor:
        """As :meth:`fewstep.networks.denoiser.NetworkDenoiser.features`."""
        ...


class Role(ABC):
    """One player.

    Args:
        name: "student", "teacher", "critic", "ema", ...
        denoiser: what it says about x0.
        added: modules it owns beside its network (a GAN head, say); trained and saved with it.
    """

    #: What its own share of the network is called in its state.
    part = "network"
    #: Whether that is an adapter of a network that others use too.
    is_adapter = False
    #: Whether the parameters that get a gradient in a turn may differ from one process to another.
    gradients_vary = False
    #: Whether it is kept with the checkpoints although nobody trains it.
    kept = False
    #: Whether a run's folder that is given as --init has to hold it.
    wanted_of_init = False

    def __init__(self, name: str, denoiser: RoleDenoiser, added: dict[str, nn.Module] | None = None) -> None:
        self.name = name
        self.denoiser = denoiser
        self.added = dict(added or {})

    def add(self, name: str, module: nn.Module) -> None:
        """Let it own one more module beside its network.

        Raises:
            ValueError: it owns something of this name already.
        """
        if name in self.modules:
            raise ValueError(f"the {self.name} has a {name} already")
        self.added[name] = module

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: AnyConditioning, end: Tensor | None = None) -> Tensor:
        """x0 (B, ...), see :class:`fewstep.diffusion.denoiser.Denoiser`."""
        return self.denoiser(x_t, t, conditioning, end)

    @property
    def has_second_time(self) -> bool:
        """Whether it is told a second time: see :mod:`fewstep.networks.flow_map`."""
        return "second_time" in self.added

    @property
    @abstractmethod
    def experts(self) -> Mapping[str, NetworkRole]:
        """The roles of its single networks: this role itself, unless several share the time (:mod:`.experts`)."""

    @property
    def single(self) -> NetworkRole:
        """This role as that of one network.

        Raises:
            ValueError: several share the time.
        """
        (own,) = self.experts.values()
        return own

    @property
    @abstractmethod
    def weights(self) -> nn.Module:
        """What of its network is the role's own: all of it, or an adapter."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Everything that the role owns, by name."""
        return {self.part: self.weights, **self.added}

    @abstractmethod
    def stock_network(self) -> nn.Module:
        """A network of the teacher's class that does alone what this role does; adapters are merged into a copy.

        Of several experts it is an ``nn.ModuleDict`` of such networks.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable parameters with names such as ``network.conv_in.weight``, in a fixed order."""
        for prefix, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{prefix}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters in the order of :meth:`named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers by prefixed name."""
        states = ((prefix, module.state_dict()) for prefix, module in self.modules.items())
        return {f"{prefix}.{name}": value for prefix, state in states for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            UserError: names or shapes do not agree.
        """
        for prefix, module in self.modules.items():
            part = {name.removeprefix(f"{prefix}."): v for name, v in state.items() if name.startswith(f"{prefix}.")}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise UserError(f"the weights of {self.name}.{prefix} do not fit this teacher: {reason}") from error

    def copy_weights(self, other: Role) -> None:
        """Take over the network weights of ``other``; added modules are this role's own and stay."""
        self.weights.load_state_dict(other.stock_network().state_dict())


def is_trained(name: str) -> bool:
    """Whether a role of this name, teacher and ema apart, has parameters that are trained."""
    return name != "target" and not name.startswith(NODE)


class NetworkRole(Role):
    """A role on a network of its own."""

    denoiser: NetworkDenoiser

    @property
    def experts(self) -> Mapping[str, NetworkRole]:
        return {self.denoiser.recipe.component: self}

    @property
    def weights(self) -> nn.Module:
        return self.denoiser.network

    def stock_network(self) -> nn.Module:
        return self.denoiser.network


def make_role(
    name: str,
    recording: Recording,
    *,
    trainable: bool,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> NetworkRole:
    """A role that starts as a copy of the recorded teacher.

    Args:
        name: of the role.
        recording: of the teacher's pipeline.
        trainable: whether its parameters ask for gradients; fixed for the whole run.
        dtype: of its parameters.
        autocast: dtype of its forward passes, None for ``dtype``.
        gradient_checkpointing: recompute activations in the backward pass.
        device: where it lives.

    Raises:
        UserError: gradient checkpointing is asked of a network that cannot do it.
    """
    # eval() for good: in train mode some networks draw from the global RNG (DiT drops labels).
    network = in_dtype(copy.deepcopy(recording.network).to(device), dtype).eval()
    network.requires_grad_(trainable)
    if gradient_checkpointing:
        allow_checkpointing(network)
    denoiser = NetworkDenoiser(network, recording.recipe, recording.schedule, recording.prediction_type, autocast)
    return NetworkRole(name, denoiser)


def allow_checkpointing(network: nn.Module, function: Callable[..., Any] | None = None) -> None:
    """Let ``network`` recompute its activations, by ``function(block, *args)`` or as diffusers does.

    Raises:
        UserError: it cannot.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(f"{type(network).__name__} has no gradient checkpointing; leave out --gradient_checkpointing")
    stock: Any = network  # a diffusers model has more than an nn.Module
    stock.enable_gradient_checkpointing(function)


def follow(roles: dict[str, Role]) -> None:
    """Put the student's followers, ``ema`` and ``target``, where the student is, with what they own beside it."""
    for name in FOLLOWERS:
        if name in roles:
            roles[name].copy_weights(roles["student"])
            for part, module in roles[name].added.items():
                module.load_state_dict(roles["student"].added[part].state_dict())


def tensors_followed(average: Role, role: Role) -> dict[str, tuple[Tensor, Tensor]]:
    """What of an average follows what of a role, by the prefixed name of both; what has several names is there once."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    seen: set[int] = set()
    for part, module in average.modules.items():
        ours, theirs = (one.state_dict(keep_vars=True) for one in (module, role.modules[part]))
        for name, value in theirs.items():
            if id(ours[name]) not in seen:
                seen.add(id(ours[name]))
                found[f"{part}.{name}"] = ours[name], value
    return found


def trained_pairs(role: Role, other: Role) -> list[tuple[Tensor, Tensor]]:
    """What is trained of the network of ``role``, each parameter beside that of ``other``; added modules stay out.

    Raises:
        UserError: they are not of one kind: a full copy and an adapter, adapters of two ranks, or other experts.
    """
    ours, theirs = (
        {name: p for name, p in one.named_parameters() if name.startswith(f"{one.part}.")} for one in (role, other)
    )
    if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in theirs.items()}:
        raise UserError(
            f"the {role.name} cannot be pulled towards the {other.name}, whose weights are of another kind: train both "
            "as full copies, or both as adapters (leave out --full_critic), or leave the pull out"
        )
    return [(ours[name], theirs[name]) for name in ours]


def update_average(average: Role, role: Role, decay: float) -> None:
    """average <- decay * average + (1 - decay) * role, over all floating tensors that both own; others are copied.

    Args:
        average: that moves.
        role: that it follows.
        decay: in [0, 1].
    """
    move_averages(tensors_followed(average, role).values(), decay)


@torch.no_grad()
def move_averages(pairs: Iterable[tuple[Tensor, Tensor]], decay: float) -> None:
    """Each pair's first tensor <- decay * it + (1 - decay) * the second; what is not floating is copied."""
    pairs = list(pairs)
    if floating := [pair for pair in pairs if pair[0].is_floating_point()]:
        torch._foreach_lerp_([a for a, _ in floating], [b for _, b in floating], 1 - decay)
    for ours, theirs in pairs:
        if not ours.is_floating_point():
            ours.copy_(theirs)
