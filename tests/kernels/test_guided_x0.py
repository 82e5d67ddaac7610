"""The raw output as x0, guided and not, in its three forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import assert_form, assert_gradients, assert_near, assert_tangent, changed, every_dtype, every_shape

from fewstep.kernels import dispatch, guided_x0

EVERYTHING = ("x_t", "skip", "out", "positive", "negative", "guidance_scale")


def example(shape: tuple[int, ...], dtype: torch.dtype, device: str, guidance: str = "a number") -> dict[str, Any]:
    inputs = guided_x0.example(shape, dtype, device)
    scales = torch.linspace(1.5, 7.5, shape[0], dtype=torch.float64, device=device)
    if guidance == "none":
        return inputs | {"negative": None}
    return inputs if guidance == "a number" else inputs | {"guidance_scale": scales}


@pytest.mark.parametrize("guidance", ["a number", "of each sample", "none"])
@every_dtype
@every_shape
def test_values_and_gradients(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, guidance: str, device: str
) -> None:
    inputs = example(shape, dtype, device, guidance)
    assert_form(guided_x0, form, inputs | {"x_t": inputs["x_t"].requires_grad_()})


def test_a_scale_may_be_shaped_to_broadcast(form: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device, "of each sample")
    assert_form(guided_x0, form, inputs | {"guidance_scale": inputs["guidance_scale"].reshape(3, 1, 1)})


def test_one_coefficient_for_all_samples(form: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device, "of each sample")
    assert_form(guided_x0, form, inputs | {name: inputs[name][:1] for name in ("skip", "out", "guidance_scale")})


def test_a_scale_for_each_of_as_many_places_as_samples_is_none_of_the_samples(form: str, device: str) -> None:
    inputs = example((3, 3, 5), torch.float32, device, "of each sample")
    placed = inputs | {"guidance_scale": inputs["guidance_scale"].reshape(1, 3, 1)}
    with dispatch.forced(form):
        ours = guided_x0.guided_x0(**placed)
    torch.testing.assert_close(ours, guided_x0.reference(**placed))


def test_raw_outputs_in_few_bits_beside_a_sample_in_float32(form: str, device: str) -> None:
    inputs = example((3, 4, 5), torch.bfloat16, device)
    assert_form(guided_x0, form, inputs | {"x_t": inputs["x_t"].float()})


@pytest.mark.parametrize("torch_form", [guided_x0.reference, guided_x0.closed], ids=["reference", "closed"])
@pytest.mark.parametrize("guidance", ["a number", "of each sample", "none"])
def test_gradcheck(torch_form, guidance: str, device: str) -> None:
    inputs = changed(example((2, 2, 3), torch.float64, device, guidance), torch.clone)
    asked = ("x_t", "out", "guidance_scale") if guidance == "of each sample" else ("x_t", "out")
    assert_gradients(torch_form, inputs | {name: inputs[name].requires_grad_() for name in asked})


@pytest.mark.parametrize("names", [EVERYTHING, ("x_t", "skip", "out"), ("positive",), ("guidance_scale",)], ids=str)
def test_tangents(form: str, names: tuple[str, ...], device: str) -> None:
    assert_tangent(guided_x0, form, example((3, 4, 5), torch.float32, device, "of each sample"), names)


@pytest.mark.parametrize("names", [("x_t", "skip", "out", "positive"), ("out",)], ids=str)
def test_tangents_without_guidance(form: str, names: tuple[str, ...], device: str) -> None:
    assert_tangent(guided_x0, form, example((3, 4, 5), torch.float32, device, "none"), names)


def test_samples_of_several_batches(form: str, device: str) -> None:
    one, other = (guided_x0.example((3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    fixed = {name: one[name] for name in ("out", "negative", "guidance_scale")}

    def convert(x_t: torch.Tensor, skip: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        return guided_x0.guided_x0(x_t=x_t, skip=skip, positive=positive, **fixed)

    both = [torch.stack([one[name], other[name]]) for name in ("x_t", "skip", "positive")]
    with dispatch.forced(form):
        ours = torch.func.vmap(convert)(*both)
    for k, inputs in enumerate((one, other)):
        assert_near(ours[k], guided_x0.reference(**changed(inputs | fixed, lambda x: x.double())))


def test_other_layouts(form: str, device: str) -> None:
    inputs = guided_x0.example((3, 4, 5, 6), torch.float32, device)
    last = changed(inputs, lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
    assert_form(guided_x0, form, last)
    assert_form(guided_x0, form, inputs | {"negative": last["negative"]})
    assert_form(guided_x0, form, changed(inputs, lambda x: x.transpose(1, 3) if x.dim() == 4 else x))


def test_coefficients_with_gradients_are_left_to_torch(device: str) -> None:
    inputs = example((3, 4, 5), torch.float32, device, "of each sample")
    inputs |= {name: inputs[name].requires_grad_() for name in ("skip", "out", "guidance_scale")}
    assert_form(guided_x0, "closed", inputs)
    with dispatch.forced("triton"), dispatch.counted() as counted:
        guided_x0.guided_x0(**inputs)
    assert counted == {("guided_x0", "closed"): 1}
