"""The trainable parameters of a role as one process holds them: whole, or a part of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.networks.roles import Role
from fewstep.training import checkpoint
from fewstep.training.distributed import fill_absent, sum_over_processes


class Held:
    """Parameters that every process holds whole: gradients are summed over processes, and every one updates all.

    Args:
        role: whose they are.

    Attributes:
        names: of the parameters, in the order of :meth:`fewstep.networks.roles.Role.named_parameters`.
        leaves: what a backward pass goes to, one for each name.
        own: what this process updates, one for each name: of the same memory as the parameter.
    """

    def __init__(self, role: Role) -> None:
        named = list(role.named_parameters())
        self.gradients_vary = role.gradients_vary
        self.names = [name for name, _ in named]
        self.leaves: list[Tensor] = [parameter for _, parameter in named]
        self.own: list[Tensor] = self.leaves

    @property
    def device(self) -> torch.device:
        """Where the processes meet, and the norm is."""
        return self.own[0].device

    def reduce(self) -> list[Tensor]:
        """Sum the gradients of a turn over processes. Returns those that there are, each of one of ``own``."""
        if self.gradients_vary:
            fill_absent(self.own)
        gradients = [parameter.grad for parameter in self.own if parameter.grad is not None]
        sum_over_processes(gradients)
        return gradients

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm () of all gradients that :meth:`reduce` gave, the same on every process."""
        return torch.nn.utils.get_total_norm(gradients)


class Holding:
    """How the processes of a run hold its roles: whole, every process alike. :mod:`.sharding` has the other way."""

    #: Whether every pass of a network needs all processes.
    together = False

    def held(self, role: Role) -> Held:
        """The trainable parameters of a role."""
        return Held(role)

    def here(self, tensor: Tensor) -> Tensor:
        """What of a tensor lies on this process."""
        return tensor

    def save(
        self, folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
    ) -> None:
        """Write a checkpoint as :func:`fewstep.training.checkpoint.save`; the main process alone calls it.

        Where the processes work ``together``, all of them call it, each with what it holds.
        """
        checkpoint.save(folder, step, tensors, state, keep)

    def tensors(self, found: checkpoint.Found, roles: dict[str, Role]) -> dict[str, dict[str, Tensor]]:
        """File stem -> name -> tensor of a checkpoint: of weights as roles take them, else what lies here."""
        return found.tensors()
