"""The bytes of one step: what each role holds, and what its turn needs beside."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fewstep.networks.roles import Role
from fewstep.programs.planning.dry_run import DryRun, backward
from fewstep.programs.planning.memory import Footprint, tensor_bytes
from fewstep.training.method import Method, Turn


@dataclass(frozen=True)
class RoleBytes:
    """Bytes of one role: what it holds beyond what others hold already, and what its training adds."""

    weights: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True)
class Moment:
    """Bytes in one turn of a step, beside weights and optimizer.

    Attributes:
        graph: what is alive when the backward pass begins: activations above all.
        peak: the most that is alive at once, gradients and what operations need for a moment included.
    """

    graph: int
    peak: int


def most_of(one: dict[str, Moment], other: dict[str, Moment]) -> dict[str, Moment]:
    """By role, the larger of two moments in each of its numbers; of a role that one of them lacks the other's."""
    both = {role: (one.get(role, moment), moment) for role, moment in other.items()}
    return one | {role: Moment(max(a.graph, b.graph), max(a.peak, b.peak)) for role, (a, b) in both.items()}


def weigh(method: Method, dry_run: DryRun, step: int) -> dict[str, Moment]:
    """By role: what its turn of a step needs beside all weights and what the network is told.

    Micro-batches after the first need it beside the gradients of those before; the second stands for all of them.
    """
    moments: dict[str, Moment] = {}
    there = [tensor for role in method.roles.values() for tensor in _tensors(role)] + dry_run.told_tensors()
    micro_batches = min(2, dry_run.config.gradient_accumulation_steps)
    with Footprint(known=there) as footprint:
        runs = [method.turns(step, dry_run.batch(step)) for _ in range(micro_batches)]
        while True:
            role, graph = None, 0
            for run in runs:
                turn = next(run, None)
                if turn is None:
                    return moments
                if isinstance(turn, Turn):
                    role, graph = turn.role, footprint.alive
                    backward(method, turn)
                del turn
            if role is not None:
                moments[role] = Moment(graph, footprint.peak)
                for parameter in method.roles[role].parameters():
                    parameter.grad = None
            footprint.restart()


def role_bytes(method: Method, holders: list[nn.Module]) -> dict[str, RoleBytes]:
    """What each role adds to what the pipeline and the roles before it hold."""
    held: list[nn.Module | list[Tensor]] = list(holders)
    before = tensor_bytes(*held)
    found: dict[str, RoleBytes] = {}
    for name, role in method.roles.items():
        held.append(_tensors(role))
        trained = sum(parameter.nbytes for parameter in role.parameters())
        now = tensor_bytes(*held)
        # AdamW has two numbers for every parameter, in its dtype.
        found[name] = RoleBytes(now - before, trained, 2 * trained)
        before = now
    return found


def _tensors(role: Role) -> list[Tensor]:
    networks = [expert.denoiser.network for expert in role.experts.values()]
    modules = [*networks, *role.modules.values()]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
