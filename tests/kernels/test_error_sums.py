"""Sums of errors over samples in their three forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forms import assert_form, assert_gradients, assert_near, assert_tangent, changed, every_dtype, every_shape

from fewstep.kernels import dispatch, error_sums
from fewstep.kernels.fused import rows

every_kind = pytest.mark.parametrize("kind", error_sums.KINDS)


def example(shape: tuple[int, ...], dtype: torch.dtype, device: str, kind: str, pair: bool = True) -> dict[str, Any]:
    return error_sums.example(shape, dtype, device) | {"kind": kind} | ({} if pair else {"b": None})


@pytest.mark.parametrize("pair", [True, False], ids=["pair", "error"])
@every_kind
@every_dtype
@every_shape
def test_values_and_gradients(
    form: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str, pair: bool, device: str
) -> None:
    inputs = example(shape, dtype, device, kind, pair)
    assert_form(error_sums, form, inputs | ({"b": inputs["b"].requires_grad_()} if pair else {}))


@pytest.mark.parametrize("torch_form", [error_sums.reference, error_sums.closed], ids=["reference", "closed"])
@every_kind
def test_gradcheck(torch_form, kind: str, device: str) -> None:
    inputs = example((2, 2, 3), torch.float64, device, kind)
    assert_gradients(torch_form, inputs | {"b": inputs["b"].requires_grad_()})


@pytest.mark.parametrize("names", [("a", "b"), ("b",)], ids=str)
@every_kind
def test_tangents(form: str, kind: str, names: tuple[str, ...], device: str) -> None:
    assert_tangent(error_sums, form, example((3, 4, 5), torch.float32, device, kind), names)


@every_kind
def test_samples_of_several_batches(form: str, kind: str, device: str) -> None:
    one, other = (error_sums.example((3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    with dispatch.forced(form):
        summed = torch.func.vmap(lambda a: error_sums.error_sums(a, one["b"], kind, 0.1))
        ours = summed(torch.stack([one["a"], other["a"]]))
    for k, inputs in enumerate((one, other)):
        assert_near(ours[k], error_sums.reference(inputs["a"].double(), one["b"].double(), kind, 0.1))


@every_kind
def test_other_layouts(form: str, kind: str, device: str) -> None:
    inputs = example((3, 4, 5, 6), torch.float32, device, kind)
    assert_form(error_sums, form, changed(inputs, lambda x: x.to(memory_format=torch.channels_last)))
    assert_form(error_sums, form, inputs | {"b": inputs["b"].to(memory_format=torch.channels_last)})
    assert_form(error_sums, form, changed(inputs, lambda x: x.transpose(1, 3)))


@every_kind
def test_no_error_has_no_gradient(form: str, kind: str, device: str) -> None:
    inputs = example((2, 3, 4), torch.float32, device, kind)
    assert_form(error_sums, form, inputs | {"b": inputs["a"].detach().clone()})


@every_kind
def test_what_is_no_number_stays_none(form: str, kind: str, device: str) -> None:
    a = torch.ones(2, 3, 4, device=device)
    a[0, 1, 2] = float("nan")
    with dispatch.forced(form):
        assert error_sums.error_sums(a, None, kind, 0.1).isnan().tolist() == [True, False]


def test_long_rows_are_shared_by_programs() -> None:
    assert rows.slices(5, 4096) == (1, 5)
    assert rows.slices(2_096_640, 4096) == (128, 16_380)
    parts, piece = rows.slices(70_001, 4096)
    assert (parts & (parts - 1), parts * piece >= 70_001, piece >= 4096) == (0, True, True)
