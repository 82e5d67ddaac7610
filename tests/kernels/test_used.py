"""Training steps of named methods run every operation, and all forms of them give the same gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.kernels import dispatch
from fewstep.trainers.sid import Sid
from tests.trainers import test_dmd2_relatives as dmd2
from tests.trainers import test_mean_flow as mean_flow
from tests.trainers import toy_consistency as consistency
from tests.trainers import toy_phased_dmd as phased_dmd
from tests.trainers import toy_sid as sid

#: Operations of every step: samples are noised, raw outputs become x0, errors are summed.
_EVERYWHERE = {"renoise", "guided_x0", "error_sums"}


def guided_sid(out: Path) -> Sid:
    return sid.vector_method(sid.config(out, guidance_scale=3.0))


METHODS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "dmd2": (lambda out: dmd2.method(dmd2.config(out)), {"score_gap"}),
    "dmd2 decoupled": (lambda out: dmd2.method(dmd2.config(out, decoupled="hybrid")), {"score_gap"}),
    "dmd2 swiftbrush": (lambda out: dmd2.method(dmd2.config(out, swiftbrush=True)), {"score_gap"}),
    "phased_dmd": (lambda out: phased_dmd.method(phased_dmd.config(out)), {"score_gap"}),
    "sid": (guided_sid, {"score_identity"}),
    "consistency": (lambda out: consistency.vector_method(consistency.config(out), guidance_scale=3.0), set()),
    "mean_flow": (
        lambda out: mean_flow.method("flow", mean_flow.config(data="images", apart=0.5)),
        {"mean_flow_target"},
    ),
}


def step(make: Callable[[Path], Any], out: Path, form: str) -> tuple[set[tuple[str, str]], dict[str, Tensor]]:
    """What ran in one step of a new method, and the gradients of its turns, by turn and parameter."""
    method, gradients = make(out), {}
    with dispatch.forced(form), dispatch.counted() as counted:
        for turn in method.turns(0, mean_flow.batch(8)):
            role = method.roles[turn.role]
            for tensor, gradient in turn.backward:
                tensor.backward(gradient)
            for name, parameter in role.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{turn.role}/{name}"] = parameter.grad
            for one in method.roles.values():
                for parameter in one.parameters():
                    parameter.grad = None
    return set(counted), gradients


@pytest.mark.parametrize("name", METHODS)
def test_a_step_runs_its_operations(name: str, form: str, tmp_path: Path) -> None:
    make, own = METHODS[name]
    ran, gradients = step(make, tmp_path, form)
    assert {(operation, form) for operation in _EVERYWHERE | own} <= ran
    assert Counter(other for _, other in ran).keys() == {form}
    _, expected = step(make, tmp_path, "reference")
    assert gradients.keys() == expected.keys() and len(gradients) >= 4
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4 * scale)
