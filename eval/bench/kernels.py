"""Every operation of the fused core in each of its forms: time, bytes, error.

A form wins on a device where it is faster here, and only then may :data:`fewstep.kernels.dispatch.WON` say so. Bytes
are the least that can move: every tensor that goes in and every one that comes out, gradients included, once.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fewstep.kernels
from fewstep.eval.bench.table import Table
from fewstep.eval.bench.timing import Clock, Spread, alternate, ratios
from fewstep.kernels import dispatch

#: Samples (B, ...) by operation; latents where nothing else is said.
SHAPES: dict[str, tuple[int, ...]] = {"adamw": (100, 128, 128), "dual_attention": (2, 4, 256, 64)}
LATENTS = (4, 4, 64, 64)
FULL: dict[str, tuple[int, ...]] = {"adamw": (1200, 148, 148), "dual_attention": (2, 8, 1024, 64)}
FULL_LATENTS = (4, 4, 128, 128)
#: Calls in one measurement of what takes microseconds.
_CALLS = 10
#: The largest error in float32.
ALLOWED = 5e-6
COMPILED = "closed, compiled"


def operations() -> dict[str, ModuleType]:
    """The modules of operations by name: those with an example."""
    names = [found.name for found in pkgutil.iter_modules(fewstep.kernels.__path__)]
    modules = {name: importlib.import_module(f"fewstep.kernels.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "example")}


def measure(device: torch.device, *, full: bool = False, blocks: int = 5, compiled: bool = False) -> Table:
    """All operations in float32.

    Args:
        device: on which.
        full: larger samples.
        blocks: of each.
        compiled: the closed form under torch.compile, too, whose first call takes seconds.
    """
    table = Table(
        "Fused operations, forward and backward, in float32",
        ("operation", "form", "shape", "time (us)", "against reference", "least bytes (kB)", "GB/s", "largest error"),
    )
    for name, module in operations().items():
        shape = (FULL if full else SHAPES).get(name, FULL_LATENTS if full else LATENTS)
        works = {form: Work(module, form, shape, device) for form in forms(module, device, compiled)}
        calls = 1 if name in SHAPES else _CALLS
        seconds = alternate({form: partial(work.play, calls) for form, work in works.items()}, Clock(device), blocks)
        for form, work in works.items():
            taken = Spread.of([one / calls for one in seconds[form]])
            gain = ratios(seconds["reference"], seconds[form])
            error, size = work.error(), work.bytes
            if error > ALLOWED:
                table.failures.append(f"{name}, {form}: its largest error is {error:.1e}, {ALLOWED:.0e} is allowed")
            won = dispatch.WON.get(name, {}).get(device.type, "closed") == form
            table.add(
                [
                    f"{name}{' (runs here)' if won else ''}",
                    form,
                    "x".join(map(str, shape)),
                    f"{taken.median * 1e6:.0f} ({taken.low * 1e6:.0f}-{taken.high * 1e6:.0f})",
                    f"{gain.words()} x",
                    f"{size / 1e3:.0f}",
                    f"{size / taken.median / 1e9:.1f}",
                    f"{error:.1e}",
                ],
                operation=name,
                form=form,
                shape=shape,
                seconds=vars(taken),
                gain=vars(gain),
                bytes=size,
                error=error,
                runs_here=won,
            )
    table.notes += [
        "least bytes: every tensor in and out once, gradients included. largest error: against float64, relative to "
        "the largest entry.",
    ]
    if not dispatch.triton_runs_on(device.type) or dispatch.interpreted():
        table.notes.append(f"Triton is not timed: it does not run on this {device.type}.")
    return table


def forms(module: ModuleType, device: torch.device, compiled: bool) -> Iterator[str]:
    """Those that run here."""
    yield from ("reference", "closed")
    if dispatch.triton_runs_on(device.type) and not dispatch.interpreted():
        yield "triton"
    own = inspect.signature(module.closed).parameters
    if compiled and set(module.example((1, 2, 4), torch.float32, "cpu")) <= set(own):
        yield COMPILED


class Work:
    """One form of one operation on its example.

    Args:
        module: of the operation.
        form: one of :func:`forms`.
        shape: of the samples.
        device: on which.
    """

    def __init__(self, module: ModuleType, form: str, shape: tuple[int, ...], device: torch.device) -> None:
        self.module, self.form, self.shape, self.device = module, form, shape, device
        public = getattr(module, module.__name__.rpartition(".")[2])
        self.function: Callable[..., Any] = torch.compile(module.closed) if form == COMPILED else public
        self.inputs = module.example(shape, torch.float32, device)
        answer = self._answer(self.inputs, self.function)
        tensors = [*tensors_in(self.inputs), *answer]
        self.bytes = sum(tensor.nbytes for tensor in tensors)

    def play(self, calls: int) -> None:
        """So many calls."""
        for _ in range(calls):
            self._answer(self.inputs, self.function)

    def error(self) -> float:
        """The largest difference to the reference in float64, relative to the largest entry there."""
        ours = self._result(torch.float32, self.function)
        public = getattr(self.module, self.module.__name__.rpartition(".")[2])
        exact = self._result(torch.float64, public)
        return max(
            float((one.double() - other).abs().max() / other.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
            for one, other in zip(ours, exact, strict=True)
        )

    def _result(self, dtype: torch.dtype, function: Callable[..., Any]) -> list[Tensor]:
        """What comes out of a fresh example, or what was changed in place there."""
        inputs = self.module.example(self.shape, dtype, self.device)
        # Of what is changed in place, gradients are spent and nobody's result.
        kept = [inputs[name] for name in inputs if name != "gradients"]
        return self._answer(inputs, function) or list(tensors_in(kept))

    def _answer(self, inputs: dict[str, Any], function: Callable[..., Any]) -> list[Tensor]:
        """All results, and the gradients of what asks for them."""
        with dispatch.forced("closed" if self.form == COMPILED else self.form):
            outputs = [leaf for leaf in tree_leaves(function(**inputs)) if isinstance(leaf, Tensor)]
            asked = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
            with_graph = [output for output in outputs if output.requires_grad]
            gradients: tuple[Tensor, ...] = ()
            if with_graph and asked:
                gradients = torch.autograd.grad(with_graph, asked, [torch.ones_like(output) for output in with_graph])
        return [output.detach() for output in (*outputs, *gradients)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All floating tensors in arguments, also in lists and in objects of the core."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif type(value).__module__.startswith("fewstep."):
        yield from tensors_in(vars(value))
