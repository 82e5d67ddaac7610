"""What a method may order between its turns: that a role starts over, or is pulled towards another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fewstep.networks.roles import Role, follow, trained_pairs
from fewstep.training.method import Order, Pull, Renew
from fewstep.training.optimization import RoleOptimizer


def carry_out(
    order: Order,
    roles: dict[str, Role],
    optimizers: Mapping[str, RoleOptimizer],
    here: Callable[[Tensor], Tensor],
    step: int,
) -> None:
    """Do what was ordered.

    Args:
        order: of the method.
        roles: of the run.
        optimizers: of its trained roles.
        here: of a tensor of a role, what lies on this process.
        step: of the run.
    """
    if isinstance(order, Renew):
        _renew(order, roles, optimizers, step)
    else:
        # After a fault on which a run ends no weight moves, and the host does not wait to know whether there was one.
        pull(order, roles, optimizers[order.role].faults.moving(), here)


def _renew(order: Renew, roles: dict[str, Role], optimizers: Mapping[str, RoleOptimizer], step: int) -> None:
    role, like = roles[order.role], roles[order.like]
    role.copy_weights(like)
    for part in role.added.keys() & like.added.keys():  # a second time, of a student that becomes its average
        role.added[part].load_state_dict(like.added[part].state_dict())
    if order.role in optimizers:  # of a role that nobody trains there is none
        optimizers[order.role].renew(step)
    if order.role == "student":
        follow(roles)


@torch.no_grad()
def pull(
    order: Pull, roles: Mapping[str, Role], moving: Tensor, here: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> None:
    """role <- decay role + (1 - decay) towards, of what is trained of their networks.

    Args:
        order: says which, and the decay.
        roles: of the run.
        moving: () 1, or 0 for nothing.
        here: of a tensor of a role, what lies on this process; default all of it.
    """
    share = (1 - order.decay) * moving
    for ours, theirs in trained_pairs(roles[order.role], roles[order.towards]):
        mine = here(ours)
        mine.lerp_(here(theirs).to(mine), share.to(mine))
