"""A scheduler for flow-matching pipelines whose times are a warped grid of its own, whatever the pipeline asks for.

This file needs torch and diffusers alone. A student's folder holds a copy of it beside its scheduler's configuration,
and its pipeline, where that is a stock one, loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

Steps are Euler's along the flow, or noise the clean sample anew (``stochastic_sampling``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

CODE_FILE = "warped_flow.py"


class WarpedFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """The times of TwinFlow's sampler (arXiv 2512.05150, after UCGM): t = 1 - (1 - (1 - u^a)^b)^c.

    u runs evenly from 1 - first to 1 - last; with last 0 to the clean sample, where no step starts.

    Args:
        num_train_timesteps: timestep of pure noise.
        first: where the first step starts, at most 1.
        last: where the last step starts, 0 for even u down to the clean sample.
        warp: (a, b, c).
        stochastic_sampling: noise the clean sample anew at each step.
    """

    code_file = CODE_FILE

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        first: float = 1.0,
        last: float = 0.0,
        warp: tuple[float, float, float] = (1.0, 1.0, 1.0),
        stochastic_sampling: bool = False,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, stochastic_sampling=stochastic_sampling)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in the stock class, but of what is asked for the number of steps alone is heeded."""
        given = [asked for asked in (sigmas, timesteps) if asked is not None]
        count = len(given[0]) if given else num_inference_steps
        last, (a, b, c) = self.config.last, self.config.warp
        ends = (1 - last, count) if last > 0 else (1.0, count + 1)
        u = torch.linspace(1 - self.config.first, *ends, dtype=torch.float64)[:count]
        super().set_timesteps(device=device, sigmas=(1 - (1 - (1 - u**a) ** b) ** c).tolist())

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The configuration, and this file beside it, without which nobody could load it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CODE_FILE).write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")


# A pipeline's model_index.json names this module as the home of its scheduler, also where it was loaded from a folder.
WarpedFlowScheduler.__module__ = CODE_FILE.removesuffix(".py")
