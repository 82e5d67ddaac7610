"""Noising in its three forms."""

from __future__ import annotations

import pytest
import torch
from forms import assert_form, assert_gradients, assert_near, assert_tangent, changed, every_dtype, every_shape

from fewstep.kernels import dispatch, renoise

EVERYTHING = ("x0", "noise", "alpha", "sigma")


@every_dtype
@every_shape
def test_values_and_gradients(form: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    inputs = renoise.example(shape, dtype, device)
    assert_form(renoise, form, inputs | {"noise": inputs["noise"].requires_grad_()})


def test_the_coefficients_have_gradients(device: str) -> None:
    inputs = renoise.example((3, 4, 5), torch.float32, device)
    inputs |= {name: inputs[name].requires_grad_() for name in ("alpha", "sigma")}
    assert_form(renoise, "closed", inputs)
    with dispatch.forced("triton"), dispatch.counted() as counted:
        renoise.renoise(**inputs)
    assert counted == {("renoise", "closed"): 1}


@pytest.mark.parametrize("torch_form", [renoise.reference, renoise.closed], ids=["reference", "closed"])
def test_gradcheck(torch_form, device: str) -> None:
    inputs = renoise.example((2, 2, 3), torch.float64, device)
    assert_gradients(torch_form, changed(inputs, torch.clone) | {"alpha": inputs["alpha"].requires_grad_()})


@pytest.mark.parametrize("names", [EVERYTHING, ("x0",), ("sigma",)], ids=str)
def test_tangents(form: str, names: tuple[str, ...], device: str) -> None:
    assert_tangent(renoise, form, renoise.example((3, 4, 5), torch.float32, device), names)


def test_samples_of_several_batches(form: str, device: str) -> None:
    one, other = (renoise.example((3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    x0 = torch.stack([one["x0"], other["x0"]], 1)
    alpha = torch.stack([one["alpha"], other["alpha"]])

    def along(x0: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return renoise.renoise(x0, one["noise"], alpha, one["sigma"])

    with dispatch.forced(form):
        ours = torch.func.vmap(along, in_dims=(1, 0))(x0, alpha)
    for k, inputs in enumerate((one, other)):
        exact = renoise.reference(inputs["x0"].double(), one["noise"].double(), inputs["alpha"], one["sigma"])
        assert_near(ours[k], exact)


def test_other_layouts(form: str, device: str) -> None:
    inputs = renoise.example((3, 4, 5, 6), torch.float32, device)
    last = changed(inputs, lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
    assert_form(renoise, form, last)
    with dispatch.forced(form):
        assert renoise.renoise(**last).is_contiguous(memory_format=torch.channels_last)
    assert_form(renoise, form, inputs | {"noise": last["noise"]})
    assert_form(renoise, form, changed(inputs, lambda x: x.transpose(1, 3) if x.dim() == 4 else x.flip(0)))


def test_one_coefficient_for_all_samples(form: str, device: str) -> None:
    inputs = renoise.example((3, 4, 5), torch.float32, device)
    assert_form(renoise, form, inputs | {name: inputs[name][:1] for name in ("alpha", "sigma")})


def test_a_sample_that_is_broadcast_is_left_to_torch(device: str) -> None:
    inputs = renoise.example((3, 4, 5), torch.float32, device)
    inputs["noise"] = inputs["noise"][:1]
    with dispatch.forced("triton"), dispatch.counted() as counted:
        ours = renoise.renoise(**inputs)
    assert counted == {("renoise", "closed"): 1}
    assert_near(ours, renoise.reference(**changed(inputs, lambda x: x.double())))


def test_the_wider_dtype_is_kept(form: str, device: str) -> None:
    inputs = renoise.example((2, 3, 4), torch.bfloat16, device)
    with dispatch.forced(form):
        assert renoise.renoise(**inputs | {"noise": inputs["noise"].float()}).dtype == torch.float32
        assert renoise.renoise(**inputs).dtype == torch.bfloat16
