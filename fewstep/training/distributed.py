"""The processes of a launch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from fewstep.errors import UserError

Result = TypeVar("Result")

_BUCKET = 2**24  # elements in one all-reduce: 64 MB of float32

# While one process exports or uploads a student, the others wait for it; NCCL's own patience is ten minutes. A process
# that dies meanwhile is not waited for: fewstep.training.fate.
_PATIENCE = timedelta(hours=6)


def join_launch(cpu: bool, **options: Any) -> Accelerator:
    """Accelerate's view of the launch that this process belongs to.

    Args:
        cpu: stay on the CPU even where there is a GPU.
        **options: of :class:`accelerate.Accelerator`.

    Raises:
        UserError: accelerate was told to launch several processes, and this is the only one.
    """
    _refuse_lone_process()
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)], **options)


def _refuse_lone_process() -> None:
    """Raises where ``accelerate launch --num_processes N`` started one process, as it does without --multi_gpu.

    It says nothing then, but only where N is more than 1 does it set a port to meet at, and a launcher of several says
    how many there are. A run with another batch than was meant costs its user days, and starting it again seconds.
    """
    counts = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # torch's and those of MPI
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if by_accelerate and not any(name in os.environ for name in counts):
        words = sys.orig_argv[1:]
        words.insert(words[:1] == ["-m"], "--")  # else torchrun takes --start, --num and their like for its own
        raise UserError(
            "accelerate launch was told to start several processes, and started this one alone, as it does where there "
            f"are not several GPUs: start torchrun --nproc_per_node N {shlex.join(words)}; if one process "
            "is meant, leave out --num_processes, and unset MASTER_PORT"
        )


def samples_line(accelerator: Accelerator, batch_size: int, micro_batches: int) -> str:
    """One line for people: how many processes there are, and how many samples a step has on all of them."""
    count = accelerator.num_processes
    factors = [f"{batch_size} sample{'s' * (batch_size != 1)}"]
    factors += [f"{micro_batches} micro-batches"] if micro_batches > 1 else []
    total = count * batch_size * micro_batches
    processes = f"{count} process{'es' * (count != 1)} on {accelerator.device.type}"
    return f"{processes}, each with {' x '.join(factors)}: {total:,} sample{'s' * (total != 1)} in a step"


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` gives on the main process, on every process: files are read once, and all go on or none.

    Args:
        accelerator: of the launch.
        work: done on the main process alone; its result can be pickled.

    Raises:
        UserError: that of ``work``, on every process.
    """
    return Processes(accelerator.process_index, accelerator.num_processes).of_main(work)


def host_group() -> dist.ProcessGroup:
    """A group of all processes of a launch that talks over the hosts' network, whatever their devices; all must ask."""
    group = dist.new_group(timeout=_PATIENCE, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # as every process is in it
    return group


def leave_launch() -> None:
    """Leave the process group: the last thing that a process does, for nothing can be waited for afterwards."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def fill_absent(parameters: Sequence[Tensor]) -> None:
    """Give a zero gradient to every parameter that has none here but has one on another process.

    Afterwards all processes hold gradients of the same parameters. Which those are, each has to read.
    """
    if not _several_processes():
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present)
    for parameter, count in zip(parameters, present.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Sum each tensor over all processes, in place, in buckets. Every process must hold the same list."""
    if not _several_processes():
        return
    bucket: list[Tensor] = []
    for tensor in [*tensors, None]:
        if bucket and (tensor is None or tensor.dtype != bucket[0].dtype or sum(b.numel() for b in bucket) > _BUCKET):
            flat = torch.cat([b.flatten() for b in bucket])
            dist.all_reduce(flat)
            for part, target in zip(flat.split([b.numel() for b in bucket]), bucket):
                target.copy_(part.view_as(target))
            bucket = []
        if tensor is not None:
            bucket.append(tensor)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def local_processes() -> int:
    """How many processes of the launch run on this machine, as their launcher says; else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1

    def of_main(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives on the main process, which alone does it, on every process.

        Raises:
            UserError: that of ``work``, on every process.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
        result, refused = outcome
        if refused is not None:
            raise UserError(refused)
        return cast(Result, result)

    def first(self, value: Result | None) -> Result | None:
        """The first process's value that is one; None where every process's is None."""
        if self.count == 1:
            return value
        told: list[Result | None] = [None] * self.count
        dist.all_gather_object(told, value)
        return next((one for one in told if one is not None), None)
