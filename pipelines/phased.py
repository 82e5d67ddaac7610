"""A pipeline whose denoiser is several networks of one kind, one for each phase of the time (Phased DMD's students).

This file needs torch and diffusers alone. A student's folder holds a copy of it that differs in two lines, the ones
marked below: which stock pipeline it is, and what its networks are called. It loads with

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

and is called like the stock pipeline. A phase is told by the timestep of the pipeline's own scheduler, whatever the
networks are fed, so that this file knows nothing of single families.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline as Stock  # <- stock

EXPERTS: tuple[str, ...] = ()  # <- experts
CODE_FILE = "phased.py"


def phased(stock: type[Stock], experts: tuple[str, ...]) -> type[Stock]:
    """The stock pipeline class with further networks beside its denoiser.

    Args:
        stock: a diffusers pipeline class.
        experts: names of the networks from noise to data; the first is the denoiser's own name in the stock class.

    Returns:
        A class whose components are those of the stock class and ``experts[1:]``, and whose configuration has
        ``phase_bounds``: for each network but the last the lowest timestep at which it is called.
    """

    class PhasedPipeline(stock):  # type: ignore[misc, valid-type]
        code_file = CODE_FILE
        model_cpu_offload_seq = _offloading(stock, experts)

        def __init__(self, *args: Any, phase_bounds: list[float] | None = None, **components: Any) -> None:
            own = {name: components.pop(name) for name in experts[1:]}
            super().__init__(*args, **components)
            self.register_modules(**own)
            self.register_to_config(phase_bounds=phase_bounds)

        __init__.__signature__ = _signature(stock, experts)

        @functools.wraps(stock.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _switching(self, experts):
                return stock.__call__(self, *args, **kwargs)

        @functools.wraps(stock.save_pretrained)
        def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
            stock.save_pretrained(self, save_directory, *args, **kwargs)
            _save_code(Path(save_directory), stock, experts)

    PhasedPipeline.__qualname__ = PhasedPipeline.__name__
    return PhasedPipeline


@contextlib.contextmanager
def _switching(pipeline: Any, experts: tuple[str, ...]) -> Iterator[None]:
    """Inside, the denoiser is the network of the scheduler's present step."""
    scheduler, networks = pipeline.scheduler, [getattr(pipeline, name) for name in experts]
    set_timesteps, step, done = scheduler.set_timesteps, scheduler.step, 0
    before = {name: vars(scheduler)[name] for name in ("set_timesteps", "step") if name in vars(scheduler)}

    def select() -> None:
        if done < len(scheduler.timesteps):
            timestep = float(scheduler.timesteps[done])
            phase = sum(timestep < bound for bound in pipeline.config.phase_bounds)
            # Past the pipeline's own __setattr__, which would write the network into the configuration.
            pipeline.__dict__[experts[0]] = networks[phase]

    # functools.wraps, because pipelines look at the arguments that either takes.
    @functools.wraps(set_timesteps)
    def selecting_first(*args: Any, **kwargs: Any) -> Any:
        result = set_timesteps(*args, **kwargs)
        select()
        return result

    @functools.wraps(step)
    def selecting_next(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        select()
        return result

    scheduler.set_timesteps, scheduler.step = selecting_first, selecting_next
    try:
        yield
    finally:
        del scheduler.set_timesteps, scheduler.step
        vars(scheduler).update(before)
        pipeline.__dict__[experts[0]] = networks[0]


def _signature(stock: type[Stock], experts: tuple[str, ...]) -> inspect.Signature:
    """That of the stock constructor, with a parameter for each network: diffusers reads off it what to load."""
    stocks = dict(inspect.signature(stock.__init__).parameters)
    required, optional = [], []
    for parameter in stocks.values():
        (required if parameter.default is inspect.Parameter.empty else optional).append(parameter)
    if experts:
        more = (stocks[experts[0]].replace(name=name, default=inspect.Parameter.empty) for name in experts[1:])
        required += [parameter for parameter in more if parameter.name not in stocks]
    bounds = inspect.Parameter("phase_bounds", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    return inspect.Signature([*required, *optional, bounds])


def _offloading(stock: type[Stock], experts: tuple[str, ...]) -> str | None:
    """The stock order in which components visit the device, with all networks in the denoiser's place."""
    order = stock.model_cpu_offload_seq
    return order and re.sub(rf"\b{experts[0]}\b", "->".join(experts), order) if experts else order


def _save_code(folder: Path, stock: type[Stock], experts: tuple[str, ...]) -> None:
    """Put this file beside the weights, for this stock class, and name it in ``model_index.json``."""
    code = Path(__file__).read_text(encoding="utf-8")
    code = re.sub(r"^.*# <- stock$", f"from diffusers import {stock.__name__} as Stock  # <- stock", code, flags=re.M)
    code = re.sub(r"^.*# <- experts$", f"EXPERTS: tuple[str, ...] = {experts!r}  # <- experts", code, flags=re.M)
    (folder / CODE_FILE).write_text(code, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = [CODE_FILE.removesuffix(".py"), "PhasedPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if EXPERTS:  # in a student's folder
    PhasedPipeline = phased(Stock, EXPERTS)
