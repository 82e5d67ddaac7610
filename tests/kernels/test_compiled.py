"""Operations inside torch.compile: one graph without a break, the closed form, the same values and gradients."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from forms import assert_near, changed, public, results

from fewstep.kernels import dispatch

OPERATIONS = ("renoise", "guided_x0", "error_sums", "mean_flow_target", "score_gap", "score_identity")


# The compiler that makes machine code takes seconds for each.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_one_graph_of_the_same_values(name: str, backend: str, device: str) -> None:
    module = import_module(f"fewstep.kernels.{name}")
    inputs = module.example((2, 3, 4, 5), torch.float32, device)
    with dispatch.counted() as counted:
        compiled = torch.compile(public(module), fullgraph=True, backend=backend)
        ours, gradients = results(compiled, inputs)
    assert not counted  # it was traced, and plain operations run
    exact, exact_gradients = results(module.reference, changed(inputs, lambda x: x.double()))
    for one, other in zip([*ours, *gradients.values()], [*exact, *exact_gradients.values()], strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("name", ["renoise", "guided_x0", "error_sums"])
def test_tangents_are_there(name: str, device: str) -> None:
    """Dynamo forgets a function's own rule and differentiates what is inside, which has to be plain torch."""
    module = import_module(f"fewstep.kernels.{name}")
    inputs = changed(module.example((2, 3, 4), torch.float32, device), torch.Tensor.detach)
    first = next(iter(inputs))
    way = torch.linspace(-1, 1, 24, device=device).reshape(2, 3, 4)

    def tangent(function, inputs, way):
        point = (inputs[first],)
        return torch.func.jvp(lambda value: function(**inputs | {first: value}), point, (way,))[1]

    inputs = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    compiled = torch.compile(lambda way: tangent(public(module), inputs, way), fullgraph=True, backend="aot_eager")
    exact = tangent(module.reference, changed(inputs, lambda x: x.double()), way.double())
    assert float(exact.abs().max()) > 0
    assert_near(compiled(way), exact)
