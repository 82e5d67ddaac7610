"""What every operation of fewstep.kernels has to hold: its forms against its reference in float64, by its example."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import jvp

from fewstep.kernels import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Latents: four channels of odd sides, one sample alone, a video.
SHAPES = ((3, 4, 5, 7), (1, 3, 9), (2, 3, 3, 4, 5))
#: Relative to the largest entry; to it comes one rounding of the result's own dtype.
_FLOAT32 = 5e-6

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)

Inputs = dict[str, Any]


def public(module: ModuleType) -> Callable[..., Any]:
    """The operation of a module, which has its name."""
    return getattr(module, module.__name__.rpartition(".")[2])


def changed(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed, new leaves that ask for gradients as the old ones did."""
    return {
        name: change(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def doubled(x: Tensor) -> Tensor:
    """The numbers in float64; truth values stay."""
    return x.double() if x.is_floating_point() else x


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """Equal to the float64 result but for one rounding, and a few in float32 on the way."""
    assert ours.shape == exact.shape
    about = torch.finfo(ours.dtype)
    rounding = 0.0 if ours.dtype == torch.float32 else about.eps
    smallest = about.tiny * about.eps  # step between numbers below those of full precision
    ours, exact = ours.detach().double(), exact.detach().double()
    torch.testing.assert_close(ours, exact, rtol=rounding, atol=_FLOAT32 * float(exact.abs().max()) + smallest)


def results(function: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All results, and the gradients of a fixed sum of those that have a graph."""
    answer = function(**inputs)
    outputs = [answer] if isinstance(answer, Tensor) else list(answer)
    asked = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    with_graph = [output for output in outputs if output.requires_grad]
    if not with_graph:
        return outputs, {}
    # Of few bits: the same numbers in every dtype.
    weights = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).bfloat16() for o in with_graph]
    seeds = [weight.reshape(o.shape).to(o.dtype) for weight, o in zip(weights, with_graph)]
    gradients = torch.autograd.grad(with_graph, list(asked.values()), seeds)
    return [output.detach() for output in outputs], dict(zip(asked, gradients))


def assert_form(module: ModuleType, form: str, inputs: Inputs) -> None:
    """Values and gradients of a form are those of the reference in float64, and the form is the one that ran."""
    name = module.__name__.rpartition(".")[2]
    with dispatch.forced(form), dispatch.counted() as counted:
        ours, our_gradients = results(public(module), inputs)
    assert counted == {(name, form): 1}
    exact, exact_gradients = results(module.reference, changed(inputs, doubled))
    assert len(ours) == len(exact) and our_gradients.keys() == exact_gradients.keys()
    for one, other in zip(ours, exact):
        assert_near(one, other)
    for key, gradient in our_gradients.items():
        assert_near(gradient, exact_gradients[key])


def assert_gradients(function: Callable[..., Any], inputs: Inputs, forward: bool = True) -> None:
    """gradcheck in float64 of a form written in torch, forward as well unless it has no such derivative."""
    double = changed(inputs, doubled)
    names = [name for name, value in double.items() if isinstance(value, Tensor) and value.requires_grad]

    def of(*values: Tensor) -> Any:
        return function(**double | dict(zip(names, values)))

    assert gradcheck(of, [double[name] for name in names], check_forward_ad=forward, check_batched_grad=forward)


def assert_tangent(module: ModuleType, form: str, inputs: Inputs, names: tuple[str, ...]) -> None:
    """The tangent of a form along its named inputs is that of the reference in float64."""
    inputs = changed(inputs, torch.Tensor.detach)
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(inputs[name].shape, generator=generator).to(inputs[name]) for name in names]

    def along(function: Callable[..., Tensor], inputs: Inputs, ways: list[Tensor]) -> Tensor:
        point = tuple(inputs[name].detach() for name in names)
        return jvp(lambda *values: function(**inputs | dict(zip(names, values))), point, tuple(ways))[1]

    with dispatch.forced(form):
        ours = along(public(module), inputs, ways)
    exact = along(module.reference, changed(inputs, doubled), [way.double() for way in ways])
    assert_near(ours, exact)
