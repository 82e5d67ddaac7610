"""The contract between a method, the bench that it is prepared at, and the training loop.

A method is one class in ``trainers/``. ``prepare(config, bench)`` makes its roles at the bench. Its generator
``turns(step, batch)`` yields the updates of one step in the paper's order; the loop does everything else
(:mod:`fewstep.training.loop`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fewstep.data.batch import Batch
from fewstep.diffusion.phases import Phase
from fewstep.diffusion.rollout import Sampler
from fewstep.diffusion.scales import GuidanceScale
from fewstep.networks.features import FeatureTap
from fewstep.networks.guidance import GuidedDenoiser
from fewstep.networks.guidance_embedding import GuidanceEmbedding
from fewstep.networks.roles import Role
from fewstep.recording import Recording
from fewstep.training.rewards import Reward


@dataclass
class Turn:
    """One update of one role.

    Attributes:
        role: whose parameters are updated; no other parameter gets a gradient.
        backward: pairs (tensor, gradient of the loss with respect to it); None stands for 1, for a scalar loss. Means
            are over the micro-batch: the loop divides by the number of micro-batches and processes.
        log: scalar tensors () for the log, without gradient; the same names on every process.
    """

    role: str
    backward: list[tuple[Tensor, Tensor | None]]
    log: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Renew:
    """Start a role over: weights like another role's, fresh optimizer, fresh average, warm-up from here.

    Of modules beside the networks, those are taken over that both roles own. A frozen role has weights alone.
    """

    role: str
    like: str


@dataclass
class Pull:
    """Move what is trained of a role's network towards another role's: C <- decay C + (1 - decay) S.

    What a role owns beside its network, and its optimizer, stay. Whoever orders it sees first that the two are alike:
    :func:`fewstep.networks.roles.trained_pairs`.
    """

    role: str
    towards: str
    decay: float


#: What a method may ask of the loop between its turns.
Order = Renew | Pull


class Bench(Protocol):
    """What a method is prepared at: that of a run (:mod:`fewstep.programs.workbench`) or of a dry run.

    The order in which a method asks is of no importance.
    """

    @property
    def recording(self) -> Recording:
        """Of the teacher."""
        ...

    @property
    def sampler(self) -> Sampler:
        """How the student moves."""
        ...

    @property
    def scheduler(self) -> Any:
        """That the student is shipped with."""
        ...

    @property
    def grids(self) -> Mapping[int, tuple[float, ...]]:
        """The student's times by step count, each in (0, 1], descending."""
        ...

    @property
    def shift(self) -> float:
        """Of a flow student's grid; 1.0 for other families."""
        ...

    @property
    def guidance_scale(self) -> GuidanceScale:
        """Of the teacher: the w of neg + w (pos - neg), or one for each expert that shares the time."""
        ...

    @property
    def further(self) -> int:
        """How many further answers each sample has that guidance may lead away from; 0 without such guidance."""
        ...

    @property
    def guidance_embedding(self) -> GuidanceEmbedding | None:
        """How the networks are told their guidance, where the run asks for it."""
        ...

    def make_roles(self, *names: str) -> dict[str, Role]:
        """The frozen teacher, the roles ``names``, and ``ema`` where the run has one."""
        ...

    def make_phased_roles(self, phases: Sequence[Phase], *names: str) -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) with an expert for each phase, and the trainable roles ``names``.

        Raises:
            UserError: the phases do not fit this teacher, or its pipeline does not walk with as many networks.
        """
        ...

    def make_flow_map_roles(self, *names: str, differentiated: bool, told: str = "next") -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) that is told where its steps end, and the roles ``names``.

        These are told one time, like the teacher. ``told`` is what the student's walks tell it: "next", "clean" or
        "same" (:mod:`fewstep.pipelines.flow_map`).

        Raises:
            UserError: no network or pipeline could be told it, or ``differentiated`` without such a derivative.
        """
        ...

    def make_plugged_roles(self) -> dict[str, Role]:
        """The frozen teacher, and a student (and ``ema``) that is its network with an adapter on its attention to text.

        Raises:
            UserError: the teacher is not guided or attends to no text, or no pipeline could have the adapter.
        """
        ...

    def make_differentiated_roles(self, *names: str, exact: bool) -> dict[str, Role]:
        """The frozen teacher, a student (and ``ema``) that is asked at all times, and the trainable roles ``names``.

        Raises:
            UserError: it knows no times but those of its table, or ``exact`` without a forward derivative.
        """
        ...

    def guided(self, role: Role, guidance_scale: GuidanceScale | None = None) -> GuidedDenoiser:
        """A role under guidance, by default the run's, which is the teacher's."""
        ...

    def tap(self, role: Role) -> FeatureTap:
        """Where a role's features are tapped, the same place in each of several experts."""
        ...

    def add_head(self, role: Role) -> FeatureTap:
        """Give a role a GAN head on its own features, and say where they are tapped.

        Several experts share one head, which sees features of the one whose time it is.
        """
        ...

    def add_image_heads(self, role: Role, extractor: str | None = None) -> Callable[[Tensor], list[Tensor]]:
        """Give a role GAN heads on features of the images that samples show, and return the way from x0 to those.

        ``extractor`` is a vision network in transformers' form, None for a stand-in: see
        :mod:`fewstep.networks.image_features`.

        Raises:
            UserError: the network cannot be had, or the teacher makes videos.
        """
        ...

    def add_module(self, role: Role, name: str, make: Callable[[], nn.Module]) -> None:
        """Give a role one more module, which is trained and kept with it, with the same weights on every process."""
        ...

    def pictures(self) -> Callable[[Tensor], Tensor]:
        """The way from x0 (B, ...) to pictures (B, C, H, W) in [0, 1], with gradient and not clipped."""
        ...

    def open_reward(self, opened: Callable[[torch.device], Reward]) -> Reward | None:
        """A reward of pictures, on the roles' device; None in a dry run, which looks at none."""
        ...

    def perceptual_distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        """LPIPS (B,) between what two batches x0 (B, ...) show, with gradient to both."""
        ...

    def describe(self, **what: Any) -> None:
        """Put on the student's card what the method knows of it: fields of :class:`fewstep.export.StudentPlan`."""
        ...


class Method(Protocol):
    """What the loop asks of a method.

    One with a role ``target`` is a :class:`TargetMethod`.

    Attributes:
        roles: every role by name; those with trainable parameters are optimized and checkpointed.
    """

    roles: dict[str, Role]

    def learning_rate(self, role: str) -> float:
        """The peak learning rate of a trainable role."""
        ...

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """The updates of one step, in order. It must hold no graph across a yield."""
        ...


@runtime_checkable
class TargetMethod(Method, Protocol):
    """A method with a role ``target``, its own slow copy of the student, that the student learns from."""

    def target_decay(self, step: int) -> float:
        """After the student's turn of a step the loop sets target <- decay * target + (1 - decay) * student."""
        ...


@runtime_checkable
class StagedMethod(Method, Protocol):
    """A method whose roles have other learning rates in its later stages."""

    def learning_rate_at(self, role: str, step: int) -> float:
        """The peak learning rate of a trainable role in the stage that ``step`` is in."""
        ...


@runtime_checkable
class UnevenMethod(Method, Protocol):
    """A method whose processes may call a network unequally often in one turn, so that they cannot share it."""

    @property
    def uneven(self) -> bool:
        """Whether it is so under these settings."""
        ...
