"""The processes of a launch."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

# While one process exports or uploads a student, the others wait for it; NCCL's own patience is ten minutes.
_PATIENCE = timedelta(hours=6)


def join_launch(cpu: bool, **options: Any) -> Accelerator:
    """Accelerate's view of the launch that this process belongs to.

    Args:
        cpu: stay on the CPU even where there is a GPU.
        **options: of :class:`accelerate.Accelerator`.
    """
    return Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)], **options)


def leave_launch() -> None:
    """Leave the process group: the last thing that a process does, for nothing can be waited for afterwards."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
