"""SiD's loss and its gradient in three forms."""

from __future__ import annotations

import pytest
import torch
from forms import assert_form, assert_gradients, changed, every_dtype, every_shape
from torch.func import jvp

from fewstep.kernels import dispatch, score_identity

every_alpha = pytest.mark.parametrize("alpha", [0.5, 1.2])


@every_alpha
@every_dtype
@every_shape
def test_values_and_gradients(form: str, shape: tuple[int, ...], dtype: torch.dtype, alpha: float, device: str) -> None:
    assert_form(score_identity, form, score_identity.example(shape, dtype, device) | {"alpha": alpha})


@pytest.mark.parametrize("asked", ["x0", "x0_teacher", "x0_critic"])
def test_a_gradient_of_one_alone(form: str, asked: str, device: str) -> None:
    inputs = score_identity.example((3, 4, 5), torch.float32, device)
    inputs |= {name: inputs[name].detach() for name in ("x0", "x0_teacher", "x0_critic") if name != asked}
    assert_form(score_identity, form, inputs)


@every_alpha
@pytest.mark.parametrize("torch_form", [score_identity.reference, score_identity.closed], ids=["reference", "closed"])
def test_gradcheck(torch_form, alpha: float, device: str) -> None:
    inputs = score_identity.example((2, 2, 3), torch.float64, device) | {"alpha": alpha}
    assert_gradients(torch_form, inputs, forward=torch_form is score_identity.reference)


def test_tangents_are_refused(form: str, device: str) -> None:
    inputs = score_identity.example((3, 4, 5), torch.float32, device)
    x0 = inputs["x0"].detach()
    with dispatch.forced(form), pytest.raises(NotImplementedError, match="score_identity has no forward derivative"):
        jvp(lambda x0: score_identity.score_identity(**inputs | {"x0": x0}), (x0,), (x0,))


def test_other_layouts(form: str, device: str) -> None:
    inputs = score_identity.example((3, 4, 5, 6), torch.float32, device)
    last = changed(inputs, lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
    assert_form(score_identity, form, last)
    assert_form(score_identity, form, inputs | {"x0_teacher": last["x0_teacher"]})
    assert_form(score_identity, form, changed(inputs, lambda x: x.transpose(1, 3) if x.dim() == 4 else x))


def test_what_is_no_number_is_seen(form: str, device: str) -> None:
    """A gradient that is none stops the run, and is not hidden."""
    inputs = changed(score_identity.example((2, 3, 4), torch.float32, device), torch.clone)
    with torch.no_grad():
        inputs["x0_teacher"][0, 1, 2] = float("nan")
    with dispatch.forced(form):
        means = score_identity.score_identity(**inputs)
    means.sum().backward()
    assert means.isnan().tolist() == [True, False]
    for name in ("x0", "x0_teacher", "x0_critic"):
        found = inputs[name].grad.isnan().nonzero().tolist()
        assert found == [[0, 1, 2]]
