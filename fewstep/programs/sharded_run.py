"""A run whose roles are divided over its processes, between whole ones: before its training and for its export."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fewstep.errors import UserError
from fewstep.networks.roles import NetworkRole, Role
from fewstep.programs.workbench import Workbench
from fewstep.recording import Recording
from fewstep.training.distributed import local_processes
from fewstep.training.method import Method, UnevenMethod
from fewstep.training.sharding import Sharding, open_mesh, shell_of


class ShardedRun:
    """The roles of a run on the mesh of its processes.

    The teacher's own network, from which the roles were made, is empty meanwhile, unless it is the caller's.

    Args:
        bench: that the method was prepared at.
        method: its roles are divided.
        exported: the role that :meth:`whole_student` will be.
        accelerator: of the launch.

    Raises:
        UserError: this run cannot be divided.
    """

    def __init__(self, bench: Workbench, method: Method, exported: Role, accelerator: Accelerator) -> None:
        self.bench, self.teacher, self.exported = bench, method.roles["teacher"], exported
        self.main = accelerator.is_main_process
        config, count = bench.config, accelerator.num_processes
        group = config.sharding_group or local_processes() if config.sharding == "hybrid" else None
        self.sharding = Sharding(open_mesh(bench.device.type, count, group), config.sharding_offload)
        self._shell = shell_of(exported, *bench.recording.networks.values())
        self.sharding.shard(list(method.roles.values()), partial(_probe, bench))
        self._emptied = bench.teacher.reload is not None
        if self._emptied:
            free_teacher(bench.recording, self.teacher, keep=self.main)

    def whole_student(self) -> Role:
        """The exported role as an ordinary one, on the main process alone; every process calls this.

        The teacher's own network is there again, too.
        """
        for name, network in self.bench.recording.networks.items() if self._emptied else ():
            own = network.named_parameters()
            parts = dict(self.teacher.experts[name].denoiser.network.named_parameters())
            for key, parameter in own:
                part = _part_of(parts, key)
                if part.dtype == parameter.dtype:
                    whole = self.sharding.whole(part)
                    parameter.data = whole if self.main else parameter.data
                else:
                    parameter.data = parameter.data.to(self.bench.device)
        self.sharding.gather(self.exported, self._shell, self.bench.device, self.main)
        return self._shell


def free_teacher(recording: Recording, teacher: Role, keep: bool) -> None:
    """Free of a teacher's own networks what its role holds as well.

    Args:
        recording: of the teacher.
        teacher: the role, on the mesh.
        keep: what the role holds in another dtype, in the memory of the CPU.
    """
    for name, network in recording.networks.items():
        parts = dict(teacher.experts[name].denoiser.network.named_parameters())
        for key, parameter in network.named_parameters():
            same = _part_of(parts, key).dtype == parameter.dtype
            nothing = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.data = parameter.data.cpu() if keep and not same else nothing


def refuse_undividable(bench: Workbench, method: Method) -> None:
    """Raise ``UserError`` for a run whose processes would not call every network equally often, or as one."""
    roles = method.roles
    why = None
    if isinstance(method, UnevenMethod) and method.uneven:
        why = "its processes would not make the same network calls, as each has its own samples of either kind"
    elif bench.conditions.grouped:
        why = f"{bench.conditions.kind}s of several lengths are called in groups, on each process in its own"
    elif len(roles["teacher"].experts) > 1:
        why = "which of the teacher's networks a process calls depends on its own samples' times"
    elif roles["student"].is_adapter and len(roles["student"].experts) > 1 and bench.config.full_critic:
        why = "a full critic that starts over beside adapters would need the teacher whole"
    if why is not None:
        raise UserError(f"--sharding cannot divide this run: {why}; leave it out")


def _probe(bench: Workbench, role: NetworkRole) -> Any:
    """Run a role's network once."""
    return role.denoiser(*bench.two_samples())


def _part_of(parts: dict[str, Any], key: str) -> Tensor:
    """The teacher's parameter by its stock name: a layer that has adapters lies within another one."""
    module, _, own = key.rpartition(".")
    return parts[key] if key in parts else parts[f"{module}.base_layer.{own}"]
