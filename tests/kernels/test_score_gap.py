"""The gap of critic and teacher in its three forms, as all its callers use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import assert_form, assert_near, changed, every_dtype, every_shape
from torch.func import jvp

from fewstep.kernels import dispatch, score_gap


def example(shape: tuple[int, ...], dtype: torch.dtype, device: str, use: str = "matching") -> dict[str, Any]:
    inputs, other = (score_gap.example(shape, dtype, device, seed) for seed in (0, 1))
    if use == "swiftbrush":
        return {name: inputs[name] for name in ("x0_critic", "x0_teacher", "weight")}
    if use == "matching":
        return inputs
    second = {"negative": other["x0_critic"], "positive": other["x0_teacher"]}
    references = {"reference_x0": other["x0"], "other_reference": inputs["x0_critic"]}
    share = 6.5 if use == "decoupled" else torch.linspace(0.5, 3, shape[0], dtype=torch.float64, device=device)
    return inputs | second | references | {"share": share, "weight": None, "normalizer_eps": 0.01}


@pytest.mark.parametrize("use", ["matching", "swiftbrush", "decoupled", "a share of each"])
@every_dtype
@every_shape
def test_values(form: str, shape: tuple[int, ...], dtype: torch.dtype, use: str, device: str) -> None:
    assert_form(score_gap, form, example(shape, dtype, device, use))


@pytest.mark.parametrize("use", ["matching", "decoupled"])
def test_the_gradient_is_that_of_the_loss(form: str, use: str, device: str) -> None:
    """It is handed over for the student's x0 in the place of the critic's: the loss's own derivative by g's step."""
    inputs = example((3, 4, 5), torch.float32, device, use)
    with dispatch.forced(form):
        loss, gradient = score_gap.score_gap(**inputs)
    direction = gradient.double() * gradient.numel()
    torch.testing.assert_close(loss.double(), 0.5 * direction.square().mean(), rtol=1e-5, atol=0)
    assert not loss.requires_grad and not gradient.requires_grad and gradient.dtype == torch.float32


@pytest.mark.parametrize("use", ["matching", "decoupled"])
@pytest.mark.parametrize("place", ["x0", "x0_teacher", "x0_critic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_pushes_nowhere(form: str, place: str, value: float, use: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device, use)
    inputs[place][1, 2, 3] = value
    assert_form(score_gap, form, inputs)
    with dispatch.forced(form):
        assert score_gap.score_gap(**inputs)[1].isfinite().all()


def test_a_sample_that_equals_its_teacher_is_not_pushed(form: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device) | {"normalizer_min": 0.0}
    inputs["x0"][1] = inputs["x0_teacher"][1]
    assert_form(score_gap, form, inputs)
    with dispatch.forced(form):
        gradient = score_gap.score_gap(**inputs)[1]
    assert not gradient[1].any() and gradient[0].all() and gradient[2].all()


def test_other_layouts(form: str, device: str) -> None:
    inputs = example((3, 4, 5, 6), torch.float32, device, "decoupled")
    last = changed(inputs, lambda x: x.to(memory_format=torch.channels_last))
    assert_form(score_gap, form, last)
    with dispatch.forced(form):
        assert score_gap.score_gap(**last)[1].is_contiguous(memory_format=torch.channels_last)
    assert_form(score_gap, form, inputs | {"x0_teacher": last["x0_teacher"], "x0": last["x0"]})


@pytest.mark.parametrize("use", ["matching", "decoupled"])
def test_tangents_are_right_or_refused(form: str, use: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device, use)
    way = torch.randn((3, 4, 5), generator=torch.Generator().manual_seed(2)).to(device)

    def along(function: Any, inputs: dict[str, Any], way: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return jvp(lambda x: function(**inputs | {"x0_critic": x}), (inputs["x0_critic"],), (way,))[1]

    with dispatch.forced(form):
        if form == "triton":
            with pytest.raises(NotImplementedError, match="score_gap has no forward derivative"):
                along(score_gap.score_gap, inputs, way)
            return
        ours = along(score_gap.score_gap, inputs, way)
    exact = along(score_gap.reference, changed(inputs, lambda x: x.double()), way.double())
    for one, other in zip(ours, exact):
        assert_near(one, other)
