"""A scheduler for flow-matching pipelines that walks as TCDScheduler does for tables: back a little, and noise again.

This file needs torch and diffusers alone. A student's folder holds a copy of it beside its scheduler's configuration,
and its pipeline, a stock one, loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

A step from sigma goes along the straight line to s = (1 - gamma) sigma', below the next sigma', and from there up to it
by fresh noise: x' = k x_s + sqrt(sigma'^2 - k^2 s^2) noise with k = (1 - sigma') / (1 - s). Gamma 0 is an Euler step of
the ODE, gamma 1 noises the clean sample anew. The last step ends at the clean sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

CODE_FILE = "tcd_flow.py"


class FlowTCDScheduler(FlowMatchEulerDiscreteScheduler):
    """Strategic stochastic sampling (Zheng et al. 2024, TCD, arXiv 2402.19159, Algorithm 4) of a flow.

    Args:
        num_train_timesteps: timestep of pure noise.
        shift: k of the grid k u / (1 + (k - 1) u), over the sigmas that the pipeline passes, else over an even grid.
        gamma: in [0, 1], how much of the noise each step draws anew.
    """

    code_file = CODE_FILE

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, gamma: float = 0.3) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As in the stock class, whose grid from a count alone ends elsewhere; here it is 1, (N - 1)/N, ..., 1/N."""
        if sigmas is None and timesteps is None and num_inference_steps is not None:
            sigmas = [1 - k / num_inference_steps for k in range(num_inference_steps)]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample (B, ...) at the next sigma, of a network that says noise - x0; computed in float32."""
        if self.step_index is None:
            self._init_step_index(timestep)
        x = sample.float()
        now, then = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        back = (1 - self.config.gamma) * then
        x = x + (back - now) * model_output.float()
        if self.config.gamma > 0 and self.step_index + 1 < len(self.timesteps):
            kept = (1 - then) / (1 - back)
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = kept * x + (then**2 - (kept * back) ** 2).sqrt() * noise
        self._step_index += 1
        x = x.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The configuration, and this file beside it, without which nobody could load it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / CODE_FILE).write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")


# A pipeline's model_index.json names this module as the home of its scheduler, also where it was loaded from a folder.
FlowTCDScheduler.__module__ = CODE_FILE.removesuffix(".py")
