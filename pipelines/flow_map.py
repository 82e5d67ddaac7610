"""A pipeline whose network is told where its step ends: two-time students (MeanFlow), any number of steps each.

This file needs torch and diffusers alone. A student's folder holds copies of it that differ in one line, the one marked
below: which stock pipeline it is. It loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

and is called like the stock pipeline. What is told is how far the step goes, in rectified flow's time sigma / (alpha +
sigma); it is read off the pipeline's own scheduler, so that this file knows nothing of single families.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline as Stock  # <- stock
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

CODE_FILE = "flow_map.py"
_FASTEST = 32.0  # radians per unit of time: what is told shall be smooth in the time, as it is differentiated


class SecondTime(ModelMixin, ConfigMixin):
    """Added to what a network makes of its time: how far the step goes. It starts as nothing at all.

    Args:
        network: the network's name in its pipeline.
        sites: modules of the network whose outputs (B, D) it is added to, and their D.
        hidden: width of its own two layers.
        frequencies: number of sines, and of cosines, of the gap that it sees.
        told: where a walk says that its steps end: "next" (at the next time), "clean" (at the clean sample, which the
            walk then noises anew) or "same" (where they begin: the velocity itself, for walks of many steps).
    """

    @register_to_config
    def __init__(
        self, network: str, sites: dict[str, int], hidden: int = 256, frequencies: int = 32, told: str = "next"
    ) -> None:
        super().__init__()
        if told not in ("next", "clean", "same"):
            raise ValueError(f"told must be 'next', 'clean' or 'same', not {told!r}")
        self.trunk = nn.Sequential(nn.Linear(2 * frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(hidden, width) for width in sites.values())
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, gap: Tensor, site: int) -> Tensor:
        """What is added at a site (B, D) for gaps (B,) in [0, 1]."""
        spread = torch.linspace(0, math.log(_FASTEST), self.config.frequencies, device=gap.device)
        angles = gap.float()[:, None] * spread.exp()
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return self.heads[site](self.trunk(waves.to(self.heads[site].weight.dtype)))

    def end(self, time: Any, following: Any) -> Any:
        """Where a walk's step is said to end that leads from ``time`` to the time ``following``, numbers or tensors."""
        return {"next": following, "clean": 0 * following, "same": time}[self.config.told]

    @contextlib.contextmanager
    def on(self, network: nn.Module, gap: Callable[[], Tensor]) -> Iterator[None]:
        """Inside, the network is told ``gap()``: (B,) on its device, or (1,) for every sample alike."""

        def tell(site: int, _module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            told = self(gap().to(output.device), site).to(output.dtype)
            told = told.repeat_interleave(output.shape[0] // told.shape[0], 0)  # a site may have rows for every frame
            return output + told.reshape(len(told), *[1] * (output.dim() - 2), told.shape[1])

        with contextlib.ExitStack() as stack:
            for site, name in enumerate(self.config.sites):
                handle = network.get_submodule(name).register_forward_hook(functools.partial(tell, site))
                stack.callback(handle.remove)
            yield


def flow_map(stock: type[Stock]) -> type[Stock]:
    """The stock pipeline class with a :class:`SecondTime` among its components."""

    class FlowMapPipeline(stock):  # type: ignore[misc, valid-type]
        code_file = CODE_FILE

        def __init__(self, *args: Any, second_time: Any, **components: Any) -> None:
            super().__init__(*args, **components)
            self.register_modules(second_time=second_time)

        __init__.__signature__ = _signature(stock)

        @functools.wraps(stock.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _telling(self):
                return stock.__call__(self, *args, **kwargs)

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            _save_code(Path(save_directory), stock)

    FlowMapPipeline.__qualname__ = FlowMapPipeline.__name__
    return FlowMapPipeline


def flow_times(scheduler: Any) -> list[float]:
    """sigma / (alpha + sigma) at every step that a scheduler is about to make, and where its last step ends.

    Raises:
        ValueError: they do not descend: no step of a flow map goes towards noise.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        signal = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()].double()
        noise = (1 - signal).sqrt()
        times = [*(noise / (signal.sqrt() + noise)).tolist(), 0.0]
    else:
        sigmas = scheduler.sigmas.cpu().double()
        times = (sigmas / (1 + sigmas) if hasattr(scheduler, "precondition_outputs") else sigmas).tolist()
    if any(after > before for before, after in itertools.pairwise(times)):
        listed = ", ".join(f"{time:.4g}" for time in times)
        raise ValueError(f"a step of this student may not end at a noisier time than it begins; the times are {listed}")
    return times


@contextlib.contextmanager
def _telling(pipeline: Any) -> Iterator[None]:
    """Inside, the network is told how far the scheduler's present step goes."""
    scheduler, second_time = pipeline.scheduler, pipeline.second_time
    network = getattr(pipeline, second_time.config.network)
    set_timesteps, step = scheduler.set_timesteps, scheduler.step
    before = {name: vars(scheduler)[name] for name in ("set_timesteps", "step") if name in vars(scheduler)}
    times: list[float] = []
    done = 0

    # functools.wraps, because pipelines look at the arguments that either takes.
    @functools.wraps(set_timesteps)
    def reading(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = set_timesteps(*args, **kwargs)
        times[:], done = flow_times(scheduler), 0
        return result

    @functools.wraps(step)
    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        return result

    def gap() -> Tensor:
        return torch.tensor([times[done] - second_time.end(times[done], times[done + 1])], dtype=torch.float32)

    scheduler.set_timesteps, scheduler.step = reading, counting
    try:
        with second_time.on(network, gap):
            yield
    finally:
        del scheduler.set_timesteps, scheduler.step
        vars(scheduler).update(before)


def _signature(stock: type[Stock]) -> inspect.Signature:
    """That of the stock constructor, with a parameter more: diffusers reads off it what to load."""
    required, optional = [], []
    for parameter in inspect.signature(stock.__init__).parameters.values():
        (required if parameter.default is inspect.Parameter.empty else optional).append(parameter)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([*required, inspect.Parameter("second_time", kind), *optional])


def _save_code(folder: Path, stock: type[Stock]) -> None:
    """Put this file beside the pipeline and beside its second time, and name it in ``model_index.json``."""
    code = Path(__file__).read_text(encoding="utf-8")
    code = re.sub(r"^.*# <- stock$", f"from diffusers import {stock.__name__} as Stock  # <- stock", code, flags=re.M)
    for place in (folder, folder / "second_time"):
        (place / CODE_FILE).write_text(code, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    module = CODE_FILE.removesuffix(".py")
    index |= {"_class_name": [module, "FlowMapPipeline"], "second_time": [module, "SecondTime"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if Stock.__name__ != "DiffusionPipeline":  # in a student's folder
    FlowMapPipeline = flow_map(Stock)
