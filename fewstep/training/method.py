"""The contract between a method and the training loop.

A method is one class in ``trainers/``. Its generator ``turns(step, batch)`` yields the updates of one step in the
paper's order; the loop does everything else (:mod:`fewstep.training.loop`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fewstep.data.batch import Batch
from fewstep.networks.roles import Role


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
    """Start a role over: weights like another role's, fresh optimizer, fresh average, warm-up from here."""

    role: str
    like: str


@dataclass(frozen=True)
class Calls:
    """Forward passes of one role in one step, counted per sample of the batch, by what flows back through them.

    Attributes:
        no_grad: nothing.
        to_parameters: the gradient of the role's own parameters.
        to_inputs: only the gradient of the sample; the role's parameters get none.
        jvp: nothing; passes that carry a tangent (forward-mode derivative), which are no part of the others.
        jvp_to_parameters: as ``to_parameters``, from the answer of a pass that carries a tangent, too.
    """

    no_grad: float = 0
    to_parameters: float = 0
    to_inputs: float = 0
    jvp: float = 0
    jvp_to_parameters: float = 0


class Method(Protocol):
    """What the loop asks of a method.

    A method with a role ``target``, its own slow copy of the student, also has ``target_decay(step)``: after the
    student's turn of that step the loop sets target <- decay * target + (1 - decay) * student.

    Attributes:
        roles: every role by name; those with trainable parameters are optimized and checkpointed.
    """

    roles: dict[str, Role]

    def learning_rate(self, role: str) -> float:
        """The peak learning rate of a trainable role."""
        ...

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Renew]:
        """The updates of one step, in order. It must hold no graph across a yield."""
        ...

    def calls(self, step: int, batch: Batch) -> dict[str, Calls]:
        """What ``turns(step, batch)`` costs where it is not logged: network calls by role, each guided pair as two.

        Passes that end early at a GAN head's tap are listed as ``<role>/features``. The batch is one of its own: what
        is drawn from it is drawn again in ``turns``.
        """
        ...
