"""MeanFlow's target in its three forms."""

from __future__ import annotations

import pytest
import torch
from forms import assert_form, assert_gradients, assert_near, assert_tangent, changed, every_dtype, every_shape
from torch.func import jvp

from fewstep.kernels import dispatch, mean_flow_target


@every_dtype
@every_shape
def test_values(form: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    assert_form(mean_flow_target, form, mean_flow_target.example(shape, dtype, device))


def test_other_layouts(form: str, device: str) -> None:
    inputs = mean_flow_target.example((3, 4, 5, 6), torch.float32, device)
    last = changed(inputs, lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x)
    assert_form(mean_flow_target, form, last)
    assert_form(mean_flow_target, form, inputs | {"derivative": last["derivative"]})


@pytest.mark.parametrize("torch_form", [mean_flow_target.reference, mean_flow_target.closed])
def test_gradcheck(torch_form, device: str) -> None:
    inputs = mean_flow_target.example((2, 2, 3), torch.float64, device)
    assert_gradients(torch_form, {name: value.requires_grad_() for name, value in inputs.items()})


def test_tangents_of_the_closed_form(device: str) -> None:
    inputs = mean_flow_target.example((3, 4, 5), torch.float32, device)
    assert_tangent(mean_flow_target, "closed", inputs, ("velocity", "derivative", "gap"))


def test_the_kernel_refuses_tangents_and_leaves_gradients_to_torch(device: str) -> None:
    if not dispatch.triton_runs_on(device):
        pytest.skip("Triton is not installed")
    inputs = mean_flow_target.example((3, 4, 5), torch.float32, device)

    def target(gap: torch.Tensor) -> torch.Tensor:
        return mean_flow_target.mean_flow_target(inputs["velocity"], inputs["derivative"], gap)

    with dispatch.forced("triton"):
        with pytest.raises(NotImplementedError, match="mean_flow_target has no forward derivative"):
            jvp(target, (inputs["gap"],), (inputs["gap"],))
        with dispatch.counted() as counted:
            target(inputs["gap"].clone().requires_grad_()).sum().backward()
    assert counted == {("mean_flow_target", "closed"): 1}


def test_samples_of_several_batches(device: str) -> None:
    one, other = (mean_flow_target.example((3, 4, 5), torch.float32, device, seed) for seed in (0, 1))
    both = [torch.stack([one[name], other[name]]) for name in one]
    ours = torch.func.vmap(mean_flow_target.mean_flow_target)(*both)
    for k, inputs in enumerate((one, other)):
        assert_near(ours[k], mean_flow_target.reference(**changed(inputs, lambda x: x.double())))
