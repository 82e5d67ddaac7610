"""Every fused operation, differentiated forward: the derivative of its definition, or an error; never zero or None.

Run on the newest and the oldest torch (make test-lowest), whose forward derivatives differ.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from forms import assert_near, changed, doubled, public
from torch import Tensor
from torch.autograd import forward_ad

from fewstep import kernels
from fewstep.kernels import dispatch

#: Changes what it is given in place, and gives nothing back.
IN_PLACE = {"adamw"}
STEP = 1e-5


def operations() -> list[ModuleType]:
    """The files of the room that have an operation of their name."""
    modules = [import_module(f"fewstep.kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    return [module for module in modules if hasattr(module, "example") and _name(module) not in IN_PLACE]


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


Several = Callable[..., tuple[Tensor, ...]]


def _ways(module: ModuleType) -> tuple[Several, Several]:
    """The operation and its definition, of several outputs."""
    if _name(module) == "dual_attention":  # its tangents are arguments; this is the function that has some
        return lambda **inputs: (module.attention(**inputs),), lambda **inputs: module.reference(**inputs)[:1]

    def several(function: Callable[..., Any]) -> Several:
        def answer(**inputs: Any) -> tuple[Tensor, ...]:
            output = function(**inputs)
            return (output,) if isinstance(output, Tensor) else tuple(output)

        return answer

    return several(public(module)), several(module.reference)


def _inputs(module: ModuleType, dtype: torch.dtype, device: str) -> dict[str, Any]:
    made = module.example((2, 3, 4, 5), dtype, device)
    return changed({name: x for name, x in made.items() if not name.endswith("_change")}, Tensor.detach)


def _differences(function: Several, inputs: dict[str, Any], ways: dict[str, Tensor]) -> list[Tensor]:
    """How the outputs change, by central differences."""
    after, before = (
        function(**inputs | {name: inputs[name] + size * way for name, way in ways.items()}) for size in (STEP, -STEP)
    )
    return [(one - other) / (2 * STEP) for one, other in zip(after, before, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("module", operations(), ids=_name)
def test_a_tangent_is_that_of_the_definition_or_refused(
    module: ModuleType, form: str, dtype: torch.dtype, device: str
) -> None:
    operation, definition = _ways(module)
    inputs = _inputs(module, dtype, device)
    names = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    ways = {name: torch.randn(inputs[name].shape, generator=generator).to(inputs[name]) for name in names}

    def told(*values: Tensor) -> tuple[Tensor, ...]:
        return operation(**inputs | dict(zip(names, values, strict=True)))

    point = tuple(inputs[name] for name in names)
    with dispatch.forced(form):
        try:
            _, tangents = torch.func.jvp(told, point, tuple(ways.values()))
        except NotImplementedError as refused:
            assert f"{_name(module)} has no forward derivative" in str(refused)
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward derivative"):
                told(*map(forward_ad.make_dual, point, ways.values()))
            return
        with forward_ad.dual_level():
            duals = map(forward_ad.unpack_dual, told(*map(forward_ad.make_dual, point, ways.values())))
            levels = [dual.tangent for dual in duals]
    expected = _differences(definition, changed(inputs, doubled), {name: way.double() for name, way in ways.items()})
    for one, other, exact in zip(tangents, levels, expected, strict=True):
        assert other is not None and bool(exact.any())
        for found in (one, other):
            # A tangent of half precision comes of sums of rounded terms.
            if dtype == torch.bfloat16:
                torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))
            else:
                assert_near(found, exact)
