"""The trainable parameters of a role as one process holds them: whole, or a part of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.networks.roles import Role
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

    def reduce(self) -> list[Tensor]:
        """Sum the gradients of a turn over processes. Returns those that there are, each the gradient of one of ``own``."""
        if self.gradients_vary:
            fill_absent(self.own)
        gradients = [parameter.grad for parameter in self.own if parameter.grad is not None]
        sum_over_processes(gradients)
        return gradients

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm () of all gradients that :meth:`reduce` gave, the same on every process."""
        return torch.nn.utils.get_total_norm(gradients)
